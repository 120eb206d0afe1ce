"""A CUDA device that really fails: every later call in the process fails, so it is one of its own.

What fails without a device, call by call, is in tests/runtime/test_device_faults.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

FAILING = """
import sys
import threading
import torch
from layerpack.formats.errors import StreamError
from layerpack.libraries.torch_api import register_host, unregister_host
from layerpack.runtime.stream import host_tier, pinned
from layerpack.runtime.engine.options import GenerateOptions
from layerpack.runtime.model import Model
from layerpack.runtime.open_options import OpenOptions
from layerpack.runtime.plan.plan import Limits

registered = set()

def note(tensor, *, read_only=False):
    code = register_host(tensor, read_only=read_only)
    if not code:
        registered.add(tensor.data_ptr())
    return code

def forget(address):
    unregister_host(address)
    registered.remove(address)

for room in (host_tier, pinned):
    room.register_host, room.unregister_host = note, forget

def fail(*_):
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
    torch.cuda.synchronize()

limits = Limits(vram_bytes=2 << 30, vram_slices=int(sys.argv[2]), host_slices=int(sys.argv[3]))
options = OpenOptions(device="cuda", limits=limits, context_tokens=64, watchdog_s=5.0)
wanted = GenerateOptions(max_new_tokens=3, raw=True)
try:
    with Model.open(sys.argv[1], options) as model:
        model.generate("hello", wanted)
        print("registered", bool(registered), flush=True)
        model.network.model.layers[1].mlp.register_forward_pre_hook(fail)
        model.generate("hello", wanted)
except StreamError as error:
    print(error, flush=True)
print("registered", bool(registered), flush=True)
print("threads", [t.name for t in threading.enumerate() if t.name.startswith("layerpack")])
try:
    with Model.open(sys.argv[1], options):
        print("opened a failed device")
except StreamError as error:
    print(error, flush=True)
try:
    pinned.PinnedBuffers(count=1, each_bytes=4096, device=torch.device("cuda", 0))
except torch.AcceleratorError:
    print("pinning is not refused", flush=True)
"""


@pytest.mark.parametrize(("vram_slices", "host_slices"), [(0, 3), (0, 0), (1, 1)])
def test_a_failed_device_is_one_line_and_all_is_closed(
    pack_of: Callable[..., Path], vram_slices: int, host_slices: int
) -> None:
    pack = str(pack_of("llama"))
    command = [sys.executable, "-c", FAILING, pack, str(vram_slices), str(host_slices)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, (lines, done.stderr[-2000:])
    assert lines[0] == "registered True"  # slices, or the buffers that the disk is read into
    assert lines[1].startswith("the device failed in a pass (CUDA error: device-side assert")
    assert lines[2:4] == ["registered False", "threads []"]
    assert lines[4].startswith("the device failed while ")
    assert lines[5] == "pinning is not refused"
