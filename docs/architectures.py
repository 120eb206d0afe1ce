"""Write docs/architectures.md: what becomes of every model type that transformers knows.

`make sweep`. Each type is made as a tiny random model, converted, verified, run, and compared with
transformers on the same pack; or it is refused, by name, before any work. Exit code 1 if anything
is neither. About ten minutes; names as arguments do those alone, and write nothing.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import transformers
from support.models.sweep import Outcome, sweep
from transformers.models.auto import modeling_auto as auto

PAGE = Path(__file__).parent / "architectures.md"
_CAUSAL = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_WITH_IMAGES = {
    **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}


def outcomes(names: list[str]) -> Iterator[Outcome]:
    """One a type, in the order of their names."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as work:
        for number, name in enumerate(names, start=1):
            outcome = sweep(name, Path(work), multimodal=name in _WITH_IMAGES)
            what = outcome.fault or outcome.refusal or f"equal ({outcome.difference:.3g})"
            print(f"{number}/{len(names)} {name}: {what[:150]}", file=sys.stderr, flush=True)
            yield outcome


def render(found: list[Outcome]) -> str:
    """The page's text."""
    converted = [o for o in found if not o.refusal]
    refused = [o for o in found if o.refusal]
    lines = [
        "# Architectures",
        "",
        "Written by `make sweep`, which makes a tiny random model of every type that the installed",
        f"transformers {transformers.__version__} knows as a causal or multimodal language model,",
        "converts it, verifies the pack, generates from it on a CPU, and compares logits and",
        "greedy text with transformers on the same pack. What is not the same is refused, by name,",
        "before any work. It also runs tokens alone, in pieces and in trees: a token's logits are",
        "the same to the bit, or the type takes no rows and its proposals cannot be checked.",
        "",
        f"## {len(converted)} types convert",
        "",
        "The largest difference of a logit is that of bfloat16 sums in another order, or none. Of",
        "multimodal types the text model becomes the pack.",
        "",
        "| type | becomes | largest difference | several tokens checked in a pass |",
        "| --- | --- | --- | --- |",
    ]
    for o in converted:
        checked = f"no: {o.no_rows}" if o.no_rows else "yes"
        lines.append(f"| {o.model_type} | {o.architecture} | {o.difference:.2g} | {checked} |")
    lines += [
        "",
        f"## {len(refused)} types are refused",
        "",
        "| type | why |",
        "| --- | --- |",
    ]
    lines += [f"| {o.model_type} | {o.refusal} |" for o in refused]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Sweep, write, tell faults."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = sys.argv[1:] or sorted({*_CAUSAL, *_WITH_IMAGES})
    found = list(outcomes(names))
    if not sys.argv[1:]:
        PAGE.write_text(render(found), encoding="utf-8")
    faults = [outcome for outcome in found if outcome.fault]
    for outcome in faults:
        print(f"FAULT {outcome.model_type}: {outcome.fault}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
