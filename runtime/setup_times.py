"""Where the time went that opening a model took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupTimes:
    """Seconds that opening took, one part after the other.

    `draft_s` is loading the draft, where there is one. `meanwhile_s` is what the caller had done
    beside it, `network_s` transformers being imported and building the model: weights are mapped,
    registered and loaded beside both, and `wait_for_weights_s` is what they took longer.
    """

    draft_s: float
    plan_s: float
    meanwhile_s: float
    network_s: float
    wait_for_weights_s: float
    attach_s: float

    @property
    def total_s(self) -> float:
        """All of opening but what the caller had done beside it."""
        beside = self.network_s + self.wait_for_weights_s
        return self.draft_s + self.plan_s + beside + self.attach_s
