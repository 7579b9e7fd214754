"""Waiting for a prompt that is counted on a thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest

from disagg_plugins.gateway.counting import WaitsForCount


class Client:
    def answering(self, answer) -> None:
        self.answer = answer


class Counter:
    """A counter whose thread gets to work when the test says so."""

    def __init__(self) -> None:
        self.submitted = []
        self.waiting = 0

    def submit(self, count):
        self.waiting += 1
        self.submitted.append((count, Future()))
        return self.submitted[-1][1]

    def left(self) -> None:
        self.waiting -= 1

    def work(self) -> None:
        for count, future in self.submitted:
            future.set_result(count())


class Prompt:
    """A prompt that knows whether it was counted."""

    short = False
    counted = False

    def ids(self):
        self.counted = True
        return [1, 2, 3]


@pytest.mark.parametrize(
    ("what", "expected", "counted"),
    [
        ("stays", [[1, 2, 3]], True),
        ("goes", [], False),
        ("waits too long", [None], False),
    ],
)
def test_what_nobody_waits_for_any_more_is_not_counted(what, expected, counted):
    async def scene() -> None:
        counter, client, prompt = Counter(), Client(), Prompt()
        got, ended = [], []
        waits = WaitsForCount(counter, got.append, ended.append)
        assert waits.begin(client, prompt, 0.0 if what == "waits too long" else 60.0)
        if what == "goes":
            client.answer.client_gone()
        elif what == "waits too long":
            while not got:  # noqa: ASYNC110  # it changes on this loop
                await asyncio.sleep(0)
        counter.work()
        while counter.waiting:  # noqa: ASYNC110  # it changes on this loop
            await asyncio.sleep(0)
        assert (got, ended, prompt.counted) == (expected, [waits], counted)

    asyncio.run(scene())
