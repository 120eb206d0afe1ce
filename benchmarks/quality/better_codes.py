"""Other codes and scales at the same bytes: what they do to a model's text.

    layerpack convert SOURCE /data/model-16 --bits 16
    python benchmarks/quality/better_codes.py /data/model-16 --calibrate third.txt \
        --text prose=alice.txt --text code=argparse.py

Every way (ways.py) ends in plain bitsandbytes NF4: blocks of 64, doubly quantised scales. Weights
are put into transformers' model decoded, as a pack's are in a pass. What came of it is `layerpack
calibrate` and `convert --calibration`; docs/log.md has the figures. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from nf4_codes import (
    BLOCK,
    Codes,
    compensated,
    decoded,
    nested,
    plain,
    rounded,
    searched,
    stretched,
)
from ways import WAYS, Way

from layerpack.runtime.quality.scores import Scores
from layerpack.runtime.quality.windows import Windows, read_text, windows_of

Weights = dict[str, torch.Tensor]


Folded = tuple[torch.Tensor | None, torch.Tensor | None]
"""Factors of a weight's rows, which are divided by them, and of its columns, multiplied."""
_AFTER_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def _sizes(squares: torch.Tensor, power: float) -> torch.Tensor:
    """A power of the inputs' sizes (in,), 1 in the mean."""
    sizes = squares.diagonal().clamp(min=squares.diagonal().mean() * 1e-4).sqrt() ** power
    found: torch.Tensor = (sizes / sizes.log().mean().exp()).clamp(0.1, 10)
    return found


class Lab:
    """A model, its 16-bit weights, and the squares of what goes into its linear layers."""

    def __init__(self, path: Path, device: torch.device, calibration: Windows) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.model: Any = model.to(device).eval()
        self.device, self.codes = device, Codes(device)
        self._calibration = calibration
        self._squares: Weights = {}  # of the 16-bit model
        self._of_plain: Weights = {}
        self.layers = [
            {
                f"{index}.{name}": module
                for name, module in layer.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            for index, layer in enumerate(self.model.model.layers)
        ]
        self._norms = {
            f"{index}.{name}": module
            for index, layer in enumerate(self.model.model.layers)
            for name, module in layer.named_children()
            if name in _AFTER_NORMS
        }
        self._linear = {name: module for layer in self.layers for name, module in layer.items()}
        self._plain = {
            name: module.weight.detach().cpu().clone()
            for name, module in (self._linear | self._norms).items()
        }

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        """Of the last tokens of each of some windows but the very last."""
        out = self.model(ids.to(self.device), use_cache=False, logits_to_keep=last + 1)
        logits: torch.Tensor = out.logits[:, :-1]
        return logits

    def squares(self, modules: dict[str, Any]) -> Weights:
        """X^T X of each linear layer's inputs over the calibration text; alike ones once."""
        found: Weights = {}
        seen: dict[int, tuple[str, torch.Tensor]] = {}  # held: another may get a freed one's place
        same: dict[str, str] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                rows = inputs[0].detach().flatten(0, -2)
                first, _ = seen.setdefault(rows.data_ptr(), (name, rows))
                if first != name:
                    same[name] = first  # q, k and v get the same tensor
                    return
                rows = rows.float()
                total = rows.T @ rows
                found[name] = found[name] + total if name in found else total

            return hook

        hooks = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
        for begin in range(0, len(self._calibration), 4):
            seen.clear()
            self.logits(self._calibration.ids[begin : begin + 4], 1)
        for hook in hooks:
            hook.remove()
        return found | {name: found[first] for name, first in same.items()}

    def _squares_of_plain(self) -> Weights:
        """Those that a plain pack's inputs give."""
        if not self._of_plain:
            for module in self._linear.values():
                module.weight.data.copy_(plain(module.weight.data))
            self._of_plain = self.squares(self._linear)
            self.restore()
        return self._of_plain

    def restore(self) -> None:
        """16-bit weights everywhere."""
        for name, module in (self._linear | self._norms).items():
            module.weight.data.copy_(self._plain[name])

    @torch.no_grad()
    def quantise(self, way: Way | None) -> None:
        """Put the weights in as they are decoded once they are quantised; None: as usual."""
        self.restore()
        if way is not None and not way.in_turn and not self._squares:
            self._squares = self.squares(self._linear)
        all_squares = self._squares
        if way is not None and way.of_plain:
            all_squares = self._squares_of_plain()
        for layer in self.layers:
            squares = self.squares(layer) if way is not None and way.in_turn else all_squares
            folded: dict[str, Folded] = {}
            if way is not None and way.fold is not None:
                folded = self._fold(layer, squares, way.fold)
            for name, module in layer.items():
                weight = module.weight.data
                if way is None:
                    weight.copy_(plain(weight))
                    continue
                rows, columns = folded.get(name, (None, None))
                seen, wanted = squares[name], weight.float()
                if rows is not None:
                    wanted = wanted / rows[:, None]
                if columns is not None:
                    wanted, seen = wanted * columns, seen / (columns[:, None] * columns)
                weight.copy_(self._by(way, wanted, seen))

    def _fold(self, layer: dict[str, Any], squares: Weights, power: float) -> dict[str, Folded]:
        """What rows and columns are to be stretched by; norms are changed here."""
        found: dict[str, Folded] = {}
        prefix = next(iter(layer)).split(".")[0]
        for norm, names in _AFTER_NORMS.items():
            module = self._norms[f"{prefix}.{norm}"]
            before = module.weight.data.clone()
            module.weight.data.copy_(before / _sizes(squares[f"{prefix}.{names[0]}"], power))
            # What the norm gives in 16 bits decides: the product stays what it was.
            columns = torch.where(module.weight == 0, 1.0, before.float() / module.weight.float())
            found |= {f"{prefix}.{name}": (None, columns) for name in names}
        sizes = _sizes(squares[f"{prefix}.mlp.down_proj"], power)
        found[f"{prefix}.mlp.up_proj"] = (sizes, found[f"{prefix}.mlp.up_proj"][1])
        return found | {f"{prefix}.mlp.down_proj": (None, sizes)}

    def _by(self, way: Way, weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        if way.power is None:
            scales = weight.float().unflatten(1, (-1, BLOCK)).abs().amax(-1)
        else:
            importance = squares.diagonal().clamp(min=squares.diagonal().mean() * 1e-4)
            scales = searched(
                weight,
                importance**way.power,
                self.codes,
                signs=way.signs,
                ratios=way.ratios,
                steps=way.steps,
            )
        scales = nested(scales)
        if way.compensation is None:
            found = rounded(weight, scales, self.codes)
        else:
            found = compensated(weight, scales, squares, way.compensation, self.codes)
        if way.gain:
            seen = squares.diagonal() if way.compensation is None else squares
            scales = nested(stretched(weight, found, scales, seen))
        return decoded(found, scales)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=32, help="of each text")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--ways", default=";".join(WAYS), help="with ; between")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.checkpoint)

    def windows(file: str, most: int) -> Windows:
        return windows_of(read_text(Path(file)), tokenizer, num_tokens=512, most=most, where=file)

    lab = Lab(
        options.checkpoint,
        torch.device(options.device),
        windows(options.calibrate, options.calibration_windows),
    )
    texts = {
        name: windows(file, options.windows)
        for name, _, file in (text.partition("=") for text in options.text)
    }

    def passes(text: Windows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for begin in range(0, len(text), 4):
            logits = lab.logits(text.ids[begin : begin + 4], text.num_scored)
            yield logits.flatten(0, 1), text.scored[begin : begin + 4].flatten()

    true = {name: [logits.cpu() for logits, _ in passes(text)] for name, text in texts.items()}
    result: dict[str, Any] = {"checkpoint": str(options.checkpoint), "device": options.device}
    for way in options.ways.split(";"):
        begin_s = time.perf_counter()
        lab.quantise(WAYS[way])
        seconds = time.perf_counter() - begin_s
        row: dict[str, Any] = {"seconds": round(seconds, 1)}
        for name, text in texts.items():
            scores = Scores()
            for (logits, tokens), reference in zip(passes(text), true[name], strict=True):
                scores.add(logits, tokens, reference)
            figures = scores.figures()
            row[name] = {
                key: [round(figures[key].value, 5), round(figures[key].standard_error, 5)]
                for key in ("perplexity", "reference_perplexity", "kl_mean", "kl_99th_percentile")
            }
            if "plain" in result:
                over = row[name]["kl_mean"][0] / result["plain"][name]["kl_mean"][0]
                row[name]["over plain"] = round(over, 3)
        result[way] = row
        print(way, json.dumps(row), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
