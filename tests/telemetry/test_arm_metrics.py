"""Two arms' metrics on one page that Prometheus can read."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from disagg_plugins.telemetry.arm_metrics import ArmMetrics
from disagg_plugins.telemetry.metrics import Metrics


def test_each_sample_tells_its_arm_and_each_family_stands_once() -> None:
    arms = {"baseline": Metrics(), "candidate": Metrics()}
    for number, metrics in enumerate(arms.values()):
        metrics.count("disagg_retries", (), number + 1)
        metrics.observe("disagg_ttft_seconds", ("local",), [0.1])
        metrics.count("disagg_canary_fallbacks")
    text = ArmMetrics(arms, ("disagg_canary",)).text().decode()
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    found = {(s.name, s.labels.get("arm")): s.value for f in families for s in f.samples}
    assert found["disagg_retries_total", "baseline"] == 1
    assert found["disagg_retries_total", "candidate"] == 2
    assert found["disagg_ttft_seconds_count", "candidate"] == 1
    assert found["disagg_canary_fallbacks_total", None] == 1
    assert ("disagg_canary_fallbacks_total", "candidate") not in found
