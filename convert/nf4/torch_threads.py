"""How many threads torch may use by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch works in the calling thread alone, in threads begun there, too.

    Where threads of our own share out the work, a team for each step of each of them only gets in
    the way: on a busy machine every step then waits for the last of its team.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
