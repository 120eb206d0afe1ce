"""What pip makes of the repository: the wheel's content, and that both ways to install work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cli", "convert", "formats", "libraries", "runtime", "serving")
PIP_OPTIONS = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building writes into the tree that it builds from."""
    copy = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *PIP_OPTIONS, "--wheel-dir", out, tree)
    (path,) = out.glob("layerpack-*.whl")
    return path


def modules(tree: Path) -> Iterator[str]:
    for name in FOLDERS:
        for path in (tree / name).rglob("*"):
            if path.is_file():
                yield f"layerpack/{path.relative_to(tree).as_posix()}"


def test_the_wheel_holds_every_module_and_nothing_else(tree: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("points.txt"))
        assert b"layerpack = layerpack.cli.main:main" in archive.read(entry_points)
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert names == set(modules(tree))
    assert {f"layerpack/{name}/py.typed" for name in FOLDERS} <= names


def test_the_wheel_runs_from_a_folder(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "install", *PIP_OPTIONS, "--target", tmp_path, wheel)
    # -P keeps the repository, which may be the current directory, from being found first.
    python = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    code = "import layerpack.cli.main as m; print(m.__file__); m.main(['--version'])"
    where, version = run(*python, "-c", code, PYTHONPATH=str(tmp_path)).splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert version == f"layerpack, version {wheel.name.split('-')[1]}"
    assert (tmp_path / "bin" / "layerpack").exists()


@pytest.mark.parametrize("editable", [False, True], ids=["installed", "editable"])
def test_the_command_works_in_an_environment_of_its_own(
    tree: Path, tmp_path: Path, editable: bool
) -> None:
    venv.create(tmp_path, with_pip=False)
    # This environment's packages stand behind the new one's own: nothing is downloaded.
    (site,) = tmp_path.glob("lib/python*/site-packages")
    base = Path(pytest.__file__).parent.parent
    (site / "behind.pth").write_text(f"{base}\n")
    python = tmp_path / "bin" / "python"
    pip: list[str | Path] = [python, "-m", "pip", "install", "--ignore-installed", *PIP_OPTIONS]
    run(*pip, *(["--editable"] if editable else []), tree)
    code = "import layerpack.cli.main as m; print(m.__file__)"
    found = Path(run(python, "-c", code).strip())
    assert found.is_relative_to(tree if editable else site)
    assert "convert" in run(tmp_path / "bin" / "layerpack", "--help")
