"""How far a pass has come, for whoever looks from another thread."""

from __future__ import annotations


class PassProgress:
    """The pass at hand has begun with `done` of `total` layers, the present one not counted."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total
