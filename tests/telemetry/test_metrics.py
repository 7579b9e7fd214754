"""The numbers as Prometheus reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from disagg_plugins.telemetry.metrics import COUNTERS, SECONDS_BOUNDS, Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.text().decode()
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_counters_and_gauges() -> None:
    metrics = Metrics()
    metrics.count("disagg_handoffs", ("consumed",))
    metrics.count("disagg_handoffs", ("consumed",), 2)
    metrics.gauge("disagg_open", "Open.", lambda: 7)
    metrics.put("disagg_plugin_failures", ("p",), 4)
    found = samples(metrics)
    assert found["disagg_handoffs_total", (("outcome", "consumed"),)] == 3
    assert found["disagg_open", ()] == 7
    assert found["disagg_retries_total", ()] == 0
    assert found["disagg_plugin_failures_total", (("plugin", "p"),)] == 4
    assert metrics.value("disagg_handoffs") == 3
    assert metrics.counts("disagg_handoffs") == {"consumed": 3}


def test_every_counter_without_labels_is_there_from_the_start_and_the_others_say_when() -> None:
    metrics = Metrics()
    found = samples(metrics)
    text = metrics.text().decode()
    for name, (_, labels) in COUNTERS.items():
        if labels:
            (told,) = [line for line in text.splitlines() if line.startswith(f"# HELP {name}_")]
            assert told.endswith("A series is there from its first event on.")
        else:
            assert found[f"{name}_total", ()] == 0


def test_histogram_buckets_are_cumulative() -> None:
    metrics = Metrics()
    values = sorted([0.0005, 0.003, 0.003, 0.2, 100.0])
    metrics.observe("disagg_itl_seconds", ("local",), values)
    metrics.observe("disagg_itl_seconds", ("local",), [0.2])
    metrics.observe("disagg_itl_seconds", ("local",), [])
    found = samples(metrics)

    def bucket(le: str) -> float:
        return found["disagg_itl_seconds_bucket", (("le", le), ("route", "local"))]

    for bound in SECONDS_BOUNDS:
        assert bucket(f"{bound:g}") == sum(v <= bound for v in [*values, 0.2])
    assert bucket("+Inf") == 6
    assert found["disagg_itl_seconds_count", (("route", "local"),)] == 6
    assert found["disagg_itl_seconds_sum", (("route", "local"),)] == sum(values) + 0.2
