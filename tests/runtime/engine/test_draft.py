"""Speculation: the text of plain greedy decoding, in fewer passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpack.convert.api import convert
from layerpack.formats.errors import CapacityError, SourceError
from layerpack.formats.pack import Pack
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.generate import Generation
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.needs import estimate_needs
from layerpack.runtime.plan.plan import Limits

PackOf = Callable[..., Path]
CheckpointOf = Callable[..., Path]
PROMPT = "hello there, this is a test of some text"
UNDRAFTED = GenerateOptions(max_new_tokens=30, draft_tokens=0)
DRAFTED = GenerateOptions(max_new_tokens=30, draft_tokens=64)
STREAMED = Limits(host_slices=0, num_slots=2)


def options(draft: Path | None, **fields: Any) -> OpenOptions:
    return OpenOptions(device="cpu", draft=None if draft is None else str(draft), **fields)


@pytest.mark.parametrize("name", ["llama-tied", "llama-odd", "qwen2", "gemma3", "phi3", "gpt_neox"])
def test_the_text_is_that_without_a_draft(pack_of: PackOf, name: str) -> None:
    with Model.open(pack_of(name), options(pack_of(name), limits=STREAMED)) as model:
        plain = model.generate(PROMPT, UNDRAFTED)
        drafted = model.generate(PROMPT, DRAFTED)
    assert drafted.token_ids == plain.token_ids
    # Random models are sure of nothing: of a tree of 64 nodes the right ones are among the first.
    assert drafted.passes <= 15
    assert drafted.accepted_tokens == 30 - drafted.passes <= drafted.proposed_tokens
    assert drafted.tokens_per_pass == 30 / drafted.passes
    assert plain.proposed_tokens == plain.accepted_tokens == 0


@pytest.mark.parametrize("limits", [Limits(), STREAMED], ids=["mapped", "two slots"])
def test_prompt_lookup(pack_of: PackOf, limits: Limits) -> None:
    looking_up = GenerateOptions(max_new_tokens=30, prompt_lookup_tokens=5)
    with Model.open(pack_of("gemma3"), options(None, limits=limits)) as model:
        plain, looked_up = model.generate(PROMPT, UNDRAFTED), model.generate(PROMPT, looking_up)
    assert looked_up.token_ids == plain.token_ids
    assert 0 < looked_up.accepted_tokens <= looked_up.proposed_tokens
    assert looked_up.passes == 30 - looked_up.accepted_tokens


def test_beyond_a_sliding_window(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    convert(str(checkpoint_of("mistral", sliding_window=48)), pack)
    with Model.open(pack, options(pack)) as model:
        plain, drafted = model.generate(PROMPT, UNDRAFTED), model.generate(PROMPT, DRAFTED)
    assert plain.prompt_tokens > 48
    assert len(drafted.token_ids) == 30
    assert drafted.token_ids == plain.token_ids
    assert drafted.passes < plain.passes / 2


def test_a_long_prompt_goes_in_passes_of_bounded_size(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = pack_of("llama")

    def run(how: GenerateOptions) -> Generation:
        with Model.open(pack, options(pack)) as model:  # anew: an open one knows the prompt
            return model.generate(PROMPT, how)

    plain = run(UNDRAFTED)
    monkeypatch.setattr("layerpack.runtime.requests.scheduler.PREFILL_TOKENS", 24)
    monkeypatch.setattr("layerpack.runtime.engine.sequence.PREFILL_TOKENS", 24)
    in_chunks, drafted = run(UNDRAFTED), run(DRAFTED)
    num_chunks = -(-plain.prompt_tokens // 24)
    assert num_chunks > 1 and in_chunks.passes - plain.passes == num_chunks - 1
    assert drafted.token_ids == in_chunks.token_ids
    assert drafted.passes == num_chunks - 1 + drafted.decode_passes
    assert drafted.accepted_tokens == 30 - drafted.decode_passes <= drafted.proposed_tokens


@pytest.mark.parametrize(("vocab_size", "draft_vocab_size"), [(300, 340), (340, 300)])
def test_a_vocabulary_padded_otherwise_just_works(
    checkpoint_of: CheckpointOf, tmp_path: Path, vocab_size: int, draft_vocab_size: int
) -> None:
    made = padded(checkpoint_of("llama", vocab_size=300), tmp_path)
    convert(str(made[vocab_size]), tmp_path / "pack")
    draft = made[draft_vocab_size]
    with Model.open(tmp_path / "pack", options(draft)) as model:
        drafted = model.generate(PROMPT, DRAFTED)
        assert drafted.token_ids == model.generate(PROMPT, UNDRAFTED).token_ids
    assert drafted.accepted_tokens > 0
    convert(str(draft), tmp_path / "draft-pack")
    with Model.open(tmp_path / "pack", options(tmp_path / "draft-pack")) as model:
        assert model.generate(PROMPT, DRAFTED).token_ids == drafted.token_ids


def padded(checkpoint: Path, folder: Path) -> dict[int, Path]:
    """The checkpoint of 300 entries, and the same model padded to 340 with entries of zeros."""
    import transformers

    larger = folder / "padded"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(340, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[300:] = 0
    model.save_pretrained(larger)
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(larger)
    return {300: checkpoint, 340: larger}


def test_sampling_with_a_draft(pack_of: PackOf) -> None:
    pack = pack_of("llama")
    wanted = GenerateOptions(max_new_tokens=30, draft_tokens=4, temperature=0.7, seed=3)
    with Model.open(pack, options(pack)) as model:
        first, again = model.generate(PROMPT, wanted), model.generate(PROMPT, wanted)
    assert first.token_ids == again.token_ids and len(first.token_ids) == 30
    assert first.passes < 30


def test_a_first_token_that_ends_the_text_asks_no_draft(pack_of: PackOf) -> None:
    pack = pack_of("llama")
    with Model.open(pack, options(pack)) as model:
        first = model.generate(PROMPT, UNDRAFTED).token_ids[0]
        model.network.generation_config.eos_token_id = [257, first]
        ended = model.generate(PROMPT, DRAFTED)
    assert ended.token_ids == (first,) and (ended.passes, ended.finish) == (1, "stop")


def test_another_tokenizer_is_refused(
    pack_of: PackOf, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint_of("qwen2"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with (
        pytest.raises(SourceError, match=r"another vocabulary.*; use a smaller model of the same"),
        Model.open(pack_of("llama"), options(other)),
    ):
        pass


def test_drafts_that_cannot_be_used_are_named(
    pack_of: PackOf, checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(checkpoint_of("llama"), tmp_path / "broken"))
    (broken / "config.json").write_text("{")
    with (
        pytest.raises(SourceError, match=rf"^draft {broken}: .* config file at 'config.json' is"),
        Model.open(pack_of("llama"), options(broken)),
    ):
        pass
    for name, said in (
        (tmp_path / "nowhere", "no such directory, and not the name of a Hub repository"),
        (Path("../nowhere"), "no such directory, and not the name of a Hub repository"),
        (tmp_path, r"cannot be loaded \(.*\)"),
    ):
        with (
            pytest.raises(SourceError, match=rf"^draft {name}: {said}$"),
            Model.open(pack_of("llama"), options(name)),
        ):
            pass
    tight = options(pack_of("qwen2"), limits=Limits(ram_bytes=1 << 12))
    with (
        pytest.raises(CapacityError, match=r"draft .*: does not fit as a whole"),
        Model.open(pack_of("llama"), tight),
    ):
        pass


def test_a_draft_and_lookup_together(pack_of: PackOf) -> None:
    both = GenerateOptions(max_new_tokens=30, draft_tokens=16, prompt_lookup_tokens=5)
    with Model.open(pack_of("gemma3"), options(pack_of("gemma3"))) as model:
        plain, found = model.generate(PROMPT, UNDRAFTED), model.generate(PROMPT, both)
        drafted = model.generate(PROMPT, replace(both, prompt_lookup_tokens=None))
    assert found.token_ids == plain.token_ids == drafted.token_ids
    assert found.passes <= drafted.passes < plain.passes


def test_memory_is_set_aside_for_a_draft(pack_of: PackOf) -> None:
    pack = Pack.open(pack_of("llama"))
    with Model.open(pack.path, options(pack.path)) as model:
        assert model.draft is not None
        # 3 layers, 2 heads of 16 for keys and as many for values, in bf16.
        assert model.draft.cache_bytes(100) == 100 * 3 * 2 * 2 * 16 * 2
    without = estimate_needs(pack, context_tokens=100)
    with_draft = estimate_needs(pack, context_tokens=100, proposed_tokens=16)
    assert with_draft.activation_bytes - without.activation_bytes == 16 * 300 * 4


def test_a_plain_draft_needs_no_accelerate(pack_of: PackOf, checkpoint_of: CheckpointOf) -> None:
    code = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] == "accelerate" else find(name, *rest)
)
from transformers.utils import is_accelerate_available
assert not is_accelerate_available()
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.engine.options import GenerateOptions
for draft in ({str(checkpoint_of("llama"))!r}, {str(pack_of("llama"))!r}):
    options = OpenOptions(device="cpu", draft=draft)
    with Model.open({str(pack_of("llama"))!r}, options) as model:
        result = model.generate({PROMPT!r}, GenerateOptions(max_new_tokens=12))
        assert result.accepted_tokens > 0, result
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
