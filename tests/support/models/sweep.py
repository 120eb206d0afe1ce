"""What becomes of a tiny random model of some type: a pack that runs as with transformers, or none.

Between a refusal before any work and the same text as transformers' there must be nothing.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.models.every import save_random, tiny_config
from support.models.oracles import dense_linear, quantised_reference
from support.runs.rows import in_a_tree, one_by_one
from torch import nn
from transformers import CONFIG_MAPPING

from layerpack.convert import convert
from layerpack.convert.plan.structure import find_structure
from layerpack.formats.errors import LayerpackError, UnsupportedError
from layerpack.formats.verify import require_intact
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.model import Model
from layerpack.runtime.network.row_network import RowNetwork
from layerpack.runtime.open_options import OpenOptions

PROMPT = "Grüße, friend"
NUM_TOKENS = 8
LEAST_DIFFERENCE = 0.05
"""Of logits of about 5, in bfloat16, in which sums may be rounded in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`refusal` is why it does not convert; `fault` what went wrong, "" for what must be there."""

    model_type: str
    architecture: str
    refusal: str = ""
    difference: float = 0.0
    no_rows: str = ""
    fault: str = ""


def sweep(model_type: str, work: Path, *, multimodal: bool = False) -> Outcome:
    """Make, convert, verify, run and compare; leaves nothing in `work`."""
    source, pack = work / "source", work / "pack"
    try:
        config, architecture, refusal = _tried(model_type, source)
        if config is None:
            return Outcome(model_type=model_type, architecture="", refusal=refusal)
        try:
            save_random(source, config, multimodal=multimodal)
            convert(str(source), pack)
        except LayerpackError as reason:  # the config alone was well
            return _fault(model_type, architecture, f"convert: {reason}")
        require_intact(pack)
        return _compare(model_type, architecture, pack, source if multimodal else None)
    except Exception as reason:
        return _fault(model_type, "", f"{type(reason).__name__}: {reason}")
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(pack, ignore_errors=True)


def _tried(model_type: str, source: Path) -> tuple[Any, str, str]:
    """A small config of the type and its architecture, or None and why it is refused.

    Where a small one cannot be made, the type's own, which may be of any size, must be refused.
    """
    refusal = ""
    for make in (tiny_config, lambda name: CONFIG_MAPPING[name]()):
        try:
            config = make(model_type)
            config.save_pretrained(source)
        except Exception as reason:
            refusal = refusal or f"no config: {reason}"
            continue
        try:
            return config, find_structure(source).architecture, ""
        except UnsupportedError as reason:
            refusal = str(reason).removeprefix(f"{source / 'config.json'}: ")
            if "cannot build" not in refusal:
                break
    return None, "", refusal


def _compare(model_type: str, architecture: str, pack: Path, whole: Path | None) -> Outcome:
    reference = quantised_reference(pack)
    if whole is not None:
        reference = _in_the_whole(reference, whole)
    with Model.open(pack, OpenOptions(device="cpu")) as model, torch.no_grad():
        result = model.generate(PROMPT, GenerateOptions(max_new_tokens=NUM_TOKENS, raw=True))
        ids = torch.tensor([model.tokenizer(PROMPT).input_ids])
        ours = model.network(ids).logits[0]
        no_rows = model.why_no_rows or ""
        same = model.rows is None or _same_bits(model.rows, [*ids[0].tolist(), *result.token_ids])
    with torch.no_grad():
        theirs = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    text = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
    )[0, ids.shape[1] :].tolist()
    difference = float((ours - theirs).abs().max())
    fault = ""
    if not difference <= LEAST_DIFFERENCE:
        fault = f"logits differ by {difference}"
    elif not same:
        fault = "a token's bits depend on who else is in the pass"
    elif not difference and no_rows and list(result.token_ids) != text:
        fault = f"{list(result.token_ids)} where transformers has {text}"
    return Outcome(
        model_type=model_type,
        architecture=architecture,
        difference=difference,
        no_rows=no_rows,
        fault=fault,
    )


def _same_bits(rows: RowNetwork, ids: list[int]) -> bool:
    alone, begin = one_by_one(rows, ids), len(ids) // 2
    found = in_a_tree(rows, ids, begin, random.Random(len(ids)))
    return torch.equal(found, alone[begin - 1 :])


def _in_the_whole(text: Any, source: Path) -> Any:
    """The multimodal model, its text model's weights those of `text`, dequantised."""
    import transformers

    whole = transformers.AutoModelForImageTextToText.from_pretrained(source).eval()
    inside, common = _embedding_path(whole), _embedding_path(text)
    while inside and inside[-1:] == common[-1:]:
        inside, common = inside[:-1], common[:-1]
    for name, module in text.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[: len(common)] == common:
            dense = dense_linear(module) if hasattr(module.weight, "quant_state") else module
            path = [*inside, *name.split(".")[len(common) :]]
            whole.get_submodule(".".join(path)).weight.data = dense.weight.data
    return whole


def _embedding_path(model: Any) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return str(names[model.get_input_embeddings()]).split(".")


def _fault(model_type: str, architecture: str, what: str) -> Outcome:
    return Outcome(model_type=model_type, architecture=architecture, fault=what)
