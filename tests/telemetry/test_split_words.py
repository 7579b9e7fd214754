from __future__ import annotations

import pytest

from disagg_plugins.telemetry.split_words import beside_happened


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"happened": 4, "routed": 5}, ""),
        ({"unobserved": 0, "ended_by_prefill": 0}, ""),
        ({"unobserved": 5}, ", 5 unobserved"),
        ({"ended_by_prefill": 10}, ", 10 ended by prefill"),
        ({"ended_by_prefill": 1, "unobserved": 5}, ", 5 unobserved, 1 ended by prefill"),
    ],
)
def test_splits_that_need_not_be_seen_are_told_where_there_are_any(
    split: dict[str, int], said: str
) -> None:
    assert beside_happened(split) == said
