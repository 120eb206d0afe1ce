"""What each way of storing a model in 4 bits does to its text: the table of docs/quality.md.

    layerpack convert SOURCE /data/model-16 --bits 16
    python benchmarks/quality/table.py /data/model-16 --text prose=alice.txt --text code=some.py

Each way becomes a pack that is judged as `layerpack eval` does, against the 16 bits. What packs of
ours never hold in NF4 (the embedding, norms and biases) is put through NF4 and back first. Where
lm_head is the embedding, the two are parted where only one of them is to be NF4. Ends in one line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nf4_codes import plain
from safetensors.torch import load_file, save_file

from layerpack.convert.api import convert
from layerpack.convert.options import ConvertOptions
from layerpack.formats.pack import Pack
from layerpack.runtime import Model, OpenOptions
from layerpack.runtime.quality.evaluate import evaluate, fitting, keep_logits
from layerpack.runtime.quality.logits_file import LogitsFile
from layerpack.runtime.quality.windows import Windows, read_text, windows_of
from layerpack.runtime.tokenizer import load_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], None]


def parted(tensors: Tensors) -> None:
    """lm_head has a copy of its own, if it has none yet."""
    tensors.setdefault(HEAD, tensors[EMBEDDING].clone())


def embedding(tensors: Tensors) -> None:
    """lm_head stays as it is."""
    parted(tensors)
    tensors[EMBEDDING] = plain(tensors[EMBEDDING])


def both(tensors: Tensors) -> None:
    """The embedding, and lm_head, which may be the same."""
    for name in {EMBEDDING, HEAD} & tensors.keys():
        tensors[name] = plain(tensors[name])


def everything(tensors: Tensors) -> None:
    """All that is not NF4 in a pack: embedding, lm_head, norms, biases."""
    linear = {name for name, tensor in tensors.items() if tensor.dim() == 2}
    for name in (tensors.keys() - linear) | {EMBEDDING} | (tensors.keys() & {HEAD}):
        tensors[name] = plain(tensors[name])


@dataclass(frozen=True, slots=True)
class Way:
    """What is done to the 16 bits, and how they are converted then."""

    title: str
    options: ConvertOptions
    edit: Edit | None = None


WAYS = (
    Way("blocks of 64 (default)", ConvertOptions()),
    Way("blocks of 32", ConvertOptions(block_size=32)),
    Way("blocks of 128", ConvertOptions(block_size=128)),
    Way("blocks of 64, scales in float32", ConvertOptions(double_quant=False)),
    Way("lm_head NF4, too", ConvertOptions(nf4_head=True), parted),
    Way("embedding NF4, too", ConvertOptions(), embedding),
    Way("both NF4, too", ConvertOptions(), both),
    Way("every tensor NF4, norms and biases, too", ConvertOptions(), everything),
)


def edited(source: Path, out: Path, edit: Edit, device: torch.device) -> None:
    """A checkpoint of the 16 bits with some of them changed."""
    out.mkdir()
    tensors: Tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file, device=str(device))
    edit(tensors)
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = HEAD not in tensors
    for file in source.glob("*"):
        if file.suffix in (".json", ".jinja", ".model") and "layerpack" not in file.name:
            shutil.copy(file, out)
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps(config))
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_host, out / "model.safetensors")


@contextmanager
def pack_of(way: Way, source: Path, work: Path, device: torch.device) -> Iterator[Pack]:
    """The pack, for the length of the block."""
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        checkpoint = source
        if way.edit is not None:
            checkpoint = Path(scratch) / "checkpoint"
            edited(source, checkpoint, way.edit, device)
        convert(str(checkpoint), Path(scratch) / "pack", way.options)
        yield Pack.open(Path(scratch) / "pack")


def judge(
    pack: Pack, texts: dict[str, tuple[Windows, Path]], how: OpenOptions
) -> dict[str, dict[str, Any]]:
    """The figures of each text."""
    result = {}
    for name, (windows, file) in texts.items():
        opened, at_a_time = fitting(pack, how, windows)
        with Model.open(pack, opened) as model, LogitsFile.open(file) as reference:
            figures = evaluate(model, windows, at_a_time, reference=reference).scores.figures()
        result[name] = {
            key: [round(one.value, 5), round(one.standard_error, 5)] for key, one in figures.items()
        }
    return result


def table(rows: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    """In Markdown."""
    yield (
        "| | bits a weight | "
        + " | ".join(f"{name}: perplexity | KL | same first choice" for name in names)
        + " |"
    )
    yield "| --- " * (2 + 3 * len(names)) + "|"
    for title, row in rows.items():
        cells = [title, f"{row['bits']:.2f}" if row["bits"] else "-"]
        for name in names:
            found = row[name]
            cells.append("{:.3f}".format(found["perplexity"][0]))
            cells.append("{:.4f} ± {:.4f}".format(*found["kl_mean"]))
            cells.append("{:.1f} %".format(100 * found["same_first_choice"][0]))
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a pack of --bits 16")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, help="of each text")
    parser.add_argument("--work", type=Path, help="directory for packs (default: beside SOURCE)")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    work = options.work or options.source.absolute().parent
    how = OpenOptions(device=options.device)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, tokenizer = Pack.open(options.source), load_tokenizer(options.source)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        texts, rows = {}, {}
        for name, _, file in (text.partition("=") for text in options.text):
            windows = windows_of(
                read_text(Path(file)), tokenizer, num_tokens=512, most=options.windows, where=file
            )
            opened, at_a_time = fitting(source, how, windows)
            logits = Path(scratch) / name
            with Model.open(source, opened) as model:
                keep_logits(model, windows, at_a_time, logits, name="16 bits")
            texts[name] = windows, logits
        rows["16 bits"] = {"bits": 16.0, **judge(source, texts, how)}
        for way in WAYS:
            with pack_of(way, options.source, work, device) as pack:
                bits = 8 * pack.manifest.total_bytes / pack.manifest.model.num_parameters
                if way.edit is not None:
                    bits = 0.0  # what went through NF4 and back is stored in 16
                rows[way.title] = {"bits": bits, **judge(pack, texts, how)}
            print(way.title, json.dumps(rows[way.title]), flush=True)
    for line in table(rows, list(texts)):
        print(line)
    print(json.dumps({"source": source.manifest.source.id, "device": device.type, "rows": rows}))


if __name__ == "__main__":
    main()
