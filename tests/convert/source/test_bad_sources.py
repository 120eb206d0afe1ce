"""What cannot be converted: one clear line, exit code 1, nothing under the target's name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerpack.cli.main import main
from layerpack.convert import ConvertOptions, convert


def edit(**fields: Any) -> Callable[[Path], None]:
    """Change fields of config.json; None takes one out."""

    def damage(source: Path) -> None:
        config = json.loads((source / "config.json").read_text()) | fields
        config = {key: value for key, value in config.items() if value is not None}
        (source / "config.json").write_text(json.dumps(config))

    return damage


def change_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def shard(source: Path) -> Path:
    return sorted(source.glob("model-*.safetensors"))[1]


def change_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the tensors, all in one file then."""

    def damage(source: Path) -> None:
        tensors = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
        for file in source.glob("model*"):
            file.unlink()
        change(tensors)
        save_file(tensors, source / "model.safetensors")

    return damage


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = value(tensors.get(name))

    return change


def with_one(value: float) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def quantised(suffix: str) -> Callable[[dict[str, Any]], None]:
    """One weight as a method stores it that is not read: a further tensor gives it away."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[UP] = torch.zeros(8, 8, dtype=torch.uint8)
        tensors[UP.removesuffix("weight") + suffix] = torch.zeros(8)

    return change


def beside(name: str, content: dict[str, Any]) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        (source / name).write_text(json.dumps(content))

    return damage


def truncate(source: Path) -> None:
    with open(shard(source), "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def no_weights(source: Path) -> None:
    for file in source.glob("model*"):
        file.unlink()


def only_pickle(source: Path) -> None:
    no_weights(source)
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
QUANT = "quantization_config"
DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "directory gone": (shutil.rmtree, "no such directory"),
    "no config": (lambda s: (s / "config.json").unlink(), "no config.json"),
    "config torn": (lambda s: (s / "config.json").write_text('{"a":'), "not valid JSON"),
    "config a list": (lambda s: (s / "config.json").write_text("[]"), "not a JSON object"),
    "no model type": (edit(model_type=None), "no .model_type."),
    "unknown model": (edit(model_type="zebra"), "'zebra' is not supported; the installed"),
    "code": (
        edit(model_type="zebra", auto_map={"AutoConfig": "modeling_zebra.Config"}),
        "needs code from its repository, which is never run",
    ),
    "nonsense config": (edit(hidden_size="many"), "cannot build"),
    "encoder-decoder": (edit(model_type="t5", is_encoder_decoder=True), "encoder-decoder"),
    "bare t5": (edit(model_type="t5"), "t5|cannot build"),
    "experts": (edit(model_type="mixtral", num_local_experts=8), "mixture of 8 experts"),
    "hidden experts": (edit(model_type="qwen3_moe"), "experts"),
    "images": (edit(model_type="paligemma", vision_config={}), "multimodal"),
    "gpt2": (edit(model_type="gpt2"), "Conv1D"),
    "mamba": (edit(model_type="mamba"), "mamba|Mamba"),
    "gptq": (edit(**{QUANT: {"quant_method": "gptq", "bits": 4}}), "'gptq'"),
    "awq": (edit(**{QUANT: {"quant_method": "awq"}}), "'awq'"),
    "mxfp4": (edit(**{QUANT: {"quant_method": "mxfp4"}}), "'mxfp4'"),
    "compressed": (edit(compression_config={"quant_method": "compressed-tensors"}), "compressed"),
    "unnamed": (edit(**{QUANT: {"group_size": 64, "bits": 4}}), "method without name.*no weight"),
    "fp8 config alone": (edit(**{QUANT: {"quant_method": "fp8"}}), "'fp8', but no weight is"),
    "int8": (change_tensors(quantised("SCB")), "bitsandbytes in 8 bit, as .*SCB shows"),
    "fp4": (change_tensors(quantised("weight.quant_state.bitsandbytes__fp4")), "4 bit fp4"),
    "gptq tensors": (change_tensors(quantised("qweight")), "GPTQ or AWQ, as .*qweight shows"),
    "packed": (change_tensors(quantised("weight_packed")), "compressed-tensors' packed"),
    "mlx": (change_tensors(quantised("scales")), "with MLX, as .*scales shows"),
    "nvfp4": (change_tensors(quantised("weight_scale_2")), "with NVFP4"),
    "modelopt": (
        beside("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
        "says that the weights are quantised with 'modelopt'",
    ),
    "gptq beside": (beside("quantize_config.json", {"bits": 4}), "'gptq', but no weight"),
    "mlx config": (edit(quantization={"bits": 4}, **{QUANT: {"bits": 4}}), "'mlx', but no"),
    "shard gone": (lambda s: shard(s).unlink(), "missing"),
    "shard truncated": (truncate, "truncated"),
    "shard empty": (lambda s: shard(s).write_bytes(b""), "too few"),
    "shard is text": (lambda s: shard(s).write_text("<html>" * 99), "not a safetensors file"),
    "index torn": (
        lambda s: (s / "model.safetensors.index.json").write_text("{"),
        "not valid JSON",
    ),
    "index without map": (
        lambda s: (s / "model.safetensors.index.json").write_text("{}"),
        "weight_map",
    ),
    "index leaves": (
        change_index(lambda m: m.update({UP: "../model.safetensors"})),
        "not to a file name",
    ),
    "index to pickle": (change_index(lambda m: m.update({UP: "x.bin"})), "only safetensors"),
    "index too long": (
        change_index(lambda m: m.update({"ghost": next(iter(m.values()))})),
        "ghost should be in",
    ),
    "only pickle": (only_pickle, "never read"),
    "nothing there": (no_weights, "no model.safetensors"),
    "missing tensor": (change_tensors(lambda t: t.pop(UP)), f"needs the tensor {UP}"),
    "strange tensor": (change_tensors(rename(UP, "a.b")), "needs the tensor|no place"),
    "extra tensor": (
        change_tensors(put("score.weight", lambda _: torch.ones(3))),
        "no place for the tensor score.weight",
    ),
    "wrong shape": (change_tensors(put(UP, lambda t: t[:-1].clone())), "has the shape"),
    "integers": (change_tensors(put(UP, lambda t: t.to(torch.int32))), "is I32"),
    "fp8 without scale": (
        change_tensors(put(UP, lambda t: t.to(torch.float8_e4m3fn))),
        "is F8_E4M3",
    ),
    "nan": (change_tensors(put(UP, with_one(float("nan")))), f"{UP}.*(NaN|finite)"),
    "infinite norm": (change_tensors(put(NORM, with_one(float("inf")))), f"{NORM}.*finite"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_bad_source_is_one_line(
    defect: str, make_checkpoint: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint("llama", max_shard_size="60KB")
    damage, message = DEFECTS[defect]
    damage(source)
    capfd.readouterr()
    check_fails([str(source), str(tmp_path / "out")], message, capfd)
    assert not (tmp_path / "out").exists()
    assert not Path("pickled").exists()


def check_fails(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], code: int = 1
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", *arguments])
    output = capfd.readouterr()
    said = [line for line in re.split("[\r\n]+", output.err) if "error:" in line.lower()]
    assert exit_info.value.code == code, output.err
    assert "Traceback" not in output.err
    assert len(said) == 1 and re.search(message, said[0]), output.err


def test_names_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    check_fails(["./nowhere", out], "no such directory", capfd)
    check_fails([str(tmp_path / "a" / "b"), out], "no such directory", capfd)
    check_fails([str(tmp_path / "x.gguf"), out], "no such file", capfd)
    (tmp_path / "x.safetensors").write_text("x")
    check_fails([str(tmp_path / "x.safetensors"), out], "name the directory", capfd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]


def test_a_compressed_pack_is_to_be_unpacked_first(
    make_checkpoint: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    convert(str(make_checkpoint("llama")), packed, ConvertOptions(zstd_level=1))
    check_fails(
        [str(packed), str(tmp_path / "out")],
        rf"error: {packed}: a compressed pack; expand it with `layerpack unpack`, and convert what",
        capfd,
    )


def test_bad_targets_and_options(
    make_checkpoint: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = str(make_checkpoint("llama", tie_word_embeddings=True))
    out = tmp_path / "out"
    capfd.readouterr()
    check_fails([source, str(tmp_path / "no" / "out")], "no such directory", capfd)
    check_fails([source, str(out), "--head", "nf4"], "leave out --head nf4", capfd)
    check_fails([source, str(out), "--revision", "main"], "no --revision", capfd)
    check_fails([source, str(out), "--block-size", "63"], "'63'", capfd, code=2)
    if not torch.cuda.is_available():
        check_fails([source, str(out), "--device", "cuda"], "no CUDA device", capfd)
    check_fails([source, str(out), "--device", "abacus"], "abacus", capfd)
    assert not list(tmp_path.glob("out*"))
    out.write_text("mine")
    check_fails([source, str(out)], "exists", capfd)
    assert out.read_text() == "mine"
    check_fails([source, str(out), "--force"], "is no pack", capfd)
    assert out.read_text() == "mine"


def test_an_nf4_source_keeps_its_block_size(
    make_checkpoint: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, pack = make_checkpoint("llama"), tmp_path / "pack"
    with pytest.raises(SystemExit):
        main(["convert", str(source), str(pack)])
    capfd.readouterr()
    arguments = [str(pack), str(tmp_path / "out"), "--block-size", "128"]
    check_fails(arguments, "already NF4 with block size 64", capfd)
