"""What `generate` imports, and what it leaves alone."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from layerpack.cli.quick_imports import quick_imports


def test_the_collector_and_the_modules_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    gc.enable()
    with pytest.raises(KeyError), quick_imports():
        assert not gc.isenabled()
        with pytest.raises(ImportError):
            __import__("sklearn")
        raise KeyError
    assert gc.isenabled() and "sklearn" not in sys.modules


def test_the_collector_leaves_alone_what_was_imported() -> None:
    """Else the first collection after it looks through all of it, in the middle of the work."""
    gc.enable()
    with quick_imports():
        imported = [[] for _ in range(5000)]  # type: ignore[var-annotated]
    try:
        assert gc.get_freeze_count() > len(imported)
        assert len(gc.get_objects()) < len(imported)
    finally:
        gc.unfreeze()


def test_what_was_imported_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", os)
    with quick_imports():
        assert sys.modules["sklearn"] is os
    assert sys.modules["sklearn"] is os


def test_libraries_that_are_of_no_use_are_not_imported(
    pack_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Installed, found by transformers if it looks, and fatal to import."""
    for name in ("scipy", "sklearn", "soundfile", "torchvision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("import os\nos._exit(77)\n")
        (tmp_path / f"{name}-1.6.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.6.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('sklearn', 'scikit-learn')}\n"
            "Version: 1.6.0\n"
        )
    command = [sys.executable, "-m", "layerpack.cli.main", "generate", str(pack_of("llama"))]
    done = subprocess.run(
        [*command, "--raw", "--prompt", "hello", "--max-new-tokens", "2", "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
