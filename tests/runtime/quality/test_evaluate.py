"""Perplexity and divergence against what transformers and float64 say of the same windows."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support.models.oracles import quantised_reference

from layerpack.formats.errors import DiskFullError, PackError, PromptError, TargetError
from layerpack.formats.pack import Pack
from layerpack.runtime import Model, OpenOptions
from layerpack.runtime.plan.plan import Limits
from layerpack.runtime.quality.evaluate import evaluate, fitting, keep_logits, logits_shape
from layerpack.runtime.quality.logits_file import LogitsFile, writing
from layerpack.runtime.quality.windows import Windows, read_text, windows_of
from layerpack.runtime.tokenizer import load_tokenizer

PackOf = Callable[..., Path]
ON_CPU = OpenOptions(device="cpu")


def windows(pack: Path, num_tokens: int = 32, most: int = 7) -> Windows:
    tokenizer = load_tokenizer(pack)
    return windows_of(read_text(None), tokenizer, num_tokens=num_tokens, most=most, where="Alice")


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_the_loss_is_that_of_transformers(pack_of: PackOf, name: str, at_a_time: int) -> None:
    pack = pack_of(name)
    found = windows(pack)
    labels = found.ids.clone()
    labels[:, : -found.num_scored] = -100
    theirs = quantised_reference(pack)
    with torch.no_grad():
        wanted = sum(
            float(theirs(found.ids[i : i + 1], labels=labels[i : i + 1]).loss) for i in range(7)
        )
    with Model.open(pack, ON_CPU) as model:
        outcome = evaluate(model, found, at_a_time)
    assert (outcome.num_windows, outcome.interrupted) == (7, False)
    assert outcome.scores.num_tokens == 7 * 15
    loss = math.log(outcome.scores.figures()["perplexity"].value)
    assert loss == pytest.approx(wanted / 7, rel=1e-3)


def test_divergence_from_the_checkpoint(
    checkpoint_of: PackOf, pack_of: PackOf, tmp_path: Path
) -> None:
    source, pack = checkpoint_of("llama"), pack_of("llama")
    found, file = windows(pack), tmp_path / "logits"
    with Model.open(pack_of("llama", nf4=False), ON_CPU) as model:
        keep_logits(model, found, 3, file, name="the source")
    with LogitsFile.open(file) as reference, Model.open(pack, ON_CPU) as model:
        assert reference.reference == "the source"
        reference.check(found)
        figures = evaluate(model, found, 2, reference=reference).scores.figures()
    rows = slice(-found.num_scored - 1, -1)
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        true = plain(found.ids).logits[:, rows].flatten(0, 1).double().log_softmax(-1)
        ours = quantised_reference(pack)(found.ids).logits[:, rows].flatten(0, 1)
    ours = ours.double().log_softmax(-1)
    divergence = (true.exp() * (true - ours)).sum(-1)
    assert figures["kl_mean"].value == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert figures["kl_median"].value == pytest.approx(float(divergence.median()), rel=1e-3)
    same = (true.argmax(-1) == ours.argmax(-1)).double().mean()
    assert figures["same_first_choice"].value == pytest.approx(float(same))
    assert figures["reference_perplexity"].value != figures["perplexity"].value
    error = float(divergence.std()) / math.sqrt(len(divergence))
    assert figures["kl_mean"].standard_error == pytest.approx(error, rel=1e-3)


def test_a_pack_diverges_from_itself_by_nothing(pack_of: PackOf, tmp_path: Path) -> None:
    pack, file = pack_of("llama"), tmp_path / "logits"
    found = windows(pack)
    with Model.open(pack, ON_CPU) as model:
        keep_logits(model, found, 7, file, name="itself")
        with LogitsFile.open(file) as reference:
            figures = evaluate(model, found, 2, reference=reference).scores.figures()
    assert figures["kl_mean"].value == 0 and figures["same_first_choice"].value == 1


@pytest.mark.parametrize("fails_after", [0, 2])
def test_making_logits_goes_on_where_it_was(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_after: int
) -> None:
    pack, file = pack_of("llama"), tmp_path / "logits"
    found, calls = windows(pack), 0
    usual = Model.logits

    def counted(model: Model, ids: torch.Tensor, last: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_after + 1:
            raise KeyboardInterrupt
        return usual(model, ids, last)

    monkeypatch.setattr(Model, "logits", counted)
    with Model.open(pack, ON_CPU) as model:
        with pytest.raises(KeyboardInterrupt):
            keep_logits(model, found, 2, file, name="a")
        assert [path.name for path in tmp_path.iterdir()] == ["logits.partial"]
        with open(tmp_path / "logits.partial", "ab") as partial:
            partial.write(b"part of a window")
        calls = 10
        keep_logits(model, found, 2, file, name="a")
        assert calls == 14 - fails_after
        keep_logits(model, found, 7, tmp_path / "whole", name="a")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["logits", "whole"]
    assert file.read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_another_began_is_begun_anew(pack_of: PackOf, tmp_path: Path) -> None:
    pack, file = Pack.open(pack_of("llama")), tmp_path / "logits"
    found = windows(pack.path)
    for name, num_done in (("one", 0), ("other", 0), ("other", 3)):
        with writing(file, logits_shape(pack, found, name)) as writer:
            assert writer.num_done == num_done
            vocabulary = logits_shape(pack, found, name).num_vocabulary
            writer.append(torch.zeros(3, found.num_scored, vocabulary))
    assert not file.exists()


def test_a_full_disk_is_told_before_and_during(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, file = Pack.open(pack_of("llama")), tmp_path / "logits"
    shape = logits_shape(pack, windows(pack.path), "a")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 9}))
        wanted = r"to write, 9 B free; make room, or take fewer windows"
        with pytest.raises(DiskFullError, match=wanted), writing(file, shape):
            pytest.fail("begun")
    assert list(tmp_path.iterdir()) == []
    logits = torch.zeros(1, shape.windows.num_scored, shape.num_vocabulary)
    with (
        pytest.raises(DiskFullError, match=r"disk is full; make room and run the same command"),
        writing(file, shape) as writer,
        open("/dev/full", "wb", buffering=0) as full,
    ):
        writer._file = full  # type: ignore[assignment]
        writer.append(logits)
    assert not file.exists()


@pytest.mark.parametrize("damage", ["cut", "other", "pack"])
def test_what_is_no_file_of_logits_is_refused(pack_of: PackOf, tmp_path: Path, damage: str) -> None:
    pack = Pack.open(pack_of("llama"))
    shape = logits_shape(pack, windows(pack.path), "a")
    file = tmp_path / "logits"
    with writing(file, shape) as writer:
        writer.append(torch.zeros(7, shape.windows.num_scored, shape.num_vocabulary))
    if damage == "cut":
        with open(file, "r+b") as cut:
            cut.truncate(5000)
    elif damage == "other":
        file.write_bytes(b"something else entirely")
    else:
        file = pack.path / "head.safetensors"
    with pytest.raises(PackError, match=str(file)), LogitsFile.open(file):
        pytest.fail("opened")


def test_logits_of_other_windows_or_vocabularies_are_refused(
    pack_of: PackOf, tmp_path: Path
) -> None:
    pack = pack_of("llama")
    found, file = windows(pack), tmp_path / "logits"
    shape = logits_shape(Pack.open(pack), found, "a")
    with writing(file, shape) as writer:
        writer.append(torch.zeros(7, found.num_scored, shape.num_vocabulary))
    with LogitsFile.open(file) as reference:
        reference.check(windows(pack, most=3))
        for other in (windows(pack, num_tokens=34), windows(pack, most=8)):
            with pytest.raises(PackError, match="another text"):
                reference.check(other)
    short = logits_shape(Pack.open(pack), found, "a")
    object.__setattr__(short, "num_vocabulary", 5)
    with writing(tmp_path / "short", short) as writer:
        writer.append(torch.zeros(7, found.num_scored, 5))
    with (
        LogitsFile.open(tmp_path / "short") as reference,
        Model.open(pack, ON_CPU) as model,
        pytest.raises(PackError, match="vocabulary has 5 tokens"),
    ):
        evaluate(model, found, 2, reference=reference)


def test_ctrl_c_gives_what_there_is(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, calls = Model.logits, iter([False, False, True])

    def interrupted(model: Model, ids: torch.Tensor, last: int) -> torch.Tensor:
        if next(calls):
            raise KeyboardInterrupt
        return usual(model, ids, last)

    monkeypatch.setattr(Model, "logits", interrupted)
    with Model.open(pack_of("llama"), ON_CPU) as model:
        outcome = evaluate(model, windows(pack_of("llama")), 2)
    assert outcome.interrupted and outcome.num_windows == 4
    assert outcome.scores.num_tokens == 4 * 15 and "perplexity" in outcome.scores.figures()


def test_as_many_windows_a_pass_as_a_prefill_pass_has_tokens(pack_of: PackOf) -> None:
    pack = Pack.open(pack_of("llama"))
    text = read_text(None)
    found = windows_of(text, load_tokenizer(pack.path), num_tokens=256, where="")
    options, at_a_time = fitting(pack, ON_CPU, found)
    assert at_a_time == 8
    assert (options.planned_tokens, options.planned_kv_tokens) == (256, 2048)
    few = OpenOptions(device="cpu", limits=Limits(host_slices=0))
    assert fitting(pack, few, windows(pack.path))[1] == 7


def test_one_process_at_a_time_makes_a_file(pack_of: PackOf, tmp_path: Path) -> None:
    shape = logits_shape(Pack.open(pack_of("llama")), windows(pack_of("llama")), "a")
    logits = torch.ones(7, shape.windows.num_scored, shape.num_vocabulary)
    with writing(tmp_path / "logits", shape) as writer:
        with (
            pytest.raises(TargetError, match="another process is making it"),
            writing(tmp_path / "logits", shape),
        ):
            pytest.fail("two at once")
        writer.append(logits)
    with LogitsFile.open(tmp_path / "logits") as file:
        assert torch.equal(file.logits(0, 7).float(), logits)


def test_a_token_that_the_model_has_not_is_named(pack_of: PackOf) -> None:
    with Model.open(pack_of("llama"), ON_CPU) as model:
        for wrong in ([[1, 5000]], [[-1, 2]]):
            with pytest.raises(PromptError, match="the model's embedding ends at"):
                model.logits(torch.tensor(wrong), 1)
        assert model.logits(torch.tensor([[1, 2, 3]]), 2).shape[:2] == (1, 2)
