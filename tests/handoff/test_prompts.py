"""The digest that ties KV to its prompt."""

from __future__ import annotations

from disagg_plugins.handoff.prompts import DIGEST_CHARS, prompt_digest


def test_the_digest_is_stable_across_processes_and_releases() -> None:
    assert prompt_digest([1, 2, 3]) == "4636993d3e1da4e9d6b8f87b79e8f7c6"


def test_any_token_any_order_any_part_changes_the_digest() -> None:
    cases = [([1, 2], ()), ([2, 1], ()), ([1, 2, 0], ()), ([1, 2], ("a",)), ([1, 2], ("a", "b"))]
    digests = {prompt_digest(ids, parts) for ids, parts in cases}
    assert len(digests) == len(cases)
    assert all(len(d) == DIGEST_CHARS for d in digests)


def test_parts_cannot_run_into_each_other() -> None:
    assert prompt_digest([1], ("ab",)) != prompt_digest([1], ("a", "b"))
