"""Runs a ``Batch`` against the clock of an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from disagg_plugins.testing.pace import Batch, Job, Profile, Step

Token = Callable[[], None]


class Pacer:
    """One worker's steps, one timer at a time.

    A step begins where the one before it was due to end, so that a late timer delays tokens and
    not the engine.

    Args:
        profile: What the steps take.
        speed: Virtual seconds that pass in one second.
    """

    def __init__(self, profile: Profile, *, speed: float = 1.0) -> None:
        self.batch = Batch(profile)
        self.speed = speed
        self.late_s = 0.0
        self._heard: dict[Job, Token] = {}
        self._coming: dict[Job, asyncio.TimerHandle] = {}
        self._step: Step | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Return the jobs that are not over."""
        return len(self._heard)

    def submit(self, job: Job, token: Token) -> None:
        """Take a job; ``token`` is called for each token it writes."""
        self._heard[job] = token
        if job.loaded:
            wait_s = self.batch.transfer_s(job) / self.speed
            loop = asyncio.get_running_loop()
            self._coming[job] = loop.call_later(wait_s, self._arrived, job)
        else:
            self._arrived(job)

    def drop(self, job: Job) -> None:
        """Forget a job, whatever became of it."""
        if self._heard.pop(job, None) is None:
            return
        coming = self._coming.pop(job, None)
        if coming is not None:
            coming.cancel()
        else:
            self.batch.drop(job)

    def stop(self) -> None:
        """Forget everything."""
        for job in list(self._heard):
            self.drop(job)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arrived(self, job: Job) -> None:
        self._coming.pop(job, None)
        self.batch.add(job)
        if self._timer is None:
            self._next(asyncio.get_running_loop().time())

    def _next(self, begin_s: float) -> None:
        self._step = self.batch.step()
        if self._step is None:
            self._timer = None
            return
        end_s = begin_s + self._step.seconds / self.speed
        self._timer = asyncio.get_running_loop().call_at(end_s, self._ended, end_s)

    def _ended(self, end_s: float) -> None:
        self.late_s = max(self.late_s, asyncio.get_running_loop().time() - end_s)
        step, self._step = self._step, None
        for job in step.wrote if step is not None else ():
            token = self._heard.get(job)
            if token is None:  # dropped during the step
                continue
            if job.over:
                del self._heard[job]
            token()
        self._next(end_s)
