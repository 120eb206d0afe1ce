"""What the passes have carried, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from layerpack.runtime.model import Model


class _Counts(Collector):
    def __init__(self, model: Model) -> None:
        self._model = model

    def collect(self) -> Iterator[Metric]:
        counts = self._model.counts
        for name, text, value in (
            ("passes", "Runs of the whole model.", counts.passes),
            ("pass_seconds", "Seconds that passes took.", counts.pass_s),
            ("rows", "Tokens that passes computed, proposed ones included.", counts.rows),
            ("free_rows", "Tokens that passes had room for beside.", counts.free_rows),
            ("generated_tokens", "Tokens of answers.", counts.generated_tokens),
            ("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
            ("cached_tokens", "Of these, known from other prompts.", counts.cached_tokens),
            ("proposed_tokens", "Tokens proposed by draft or lookup.", counts.proposed_tokens),
            ("accepted_tokens", "Of these, right.", counts.accepted_tokens),
        ):
            yield CounterMetricFamily(f"layerpack_{name}", text, value=value)
        slots, free = self._model.kv_slots
        for name, text, value in (
            ("running", "Answers under way.", counts.running),
            ("waiting", "Requests in the queue.", self._model.num_waiting),
            ("kv_slots", "Tokens that the KV cache has room for.", slots),
            ("kv_slots_free", "Of these, nobody's.", free),
        ):
            yield GaugeMetricFamily(f"layerpack_{name}", text, value=value)


def metrics_text(model: Model) -> tuple[bytes, str]:
    """The page, and its media type."""
    registry = CollectorRegistry()
    registry.register(_Counts(model))
    return generate_latest(registry), CONTENT_TYPE_LATEST
