"""The course of one pretend answer: the handoff it begins with, and when its tokens are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from disagg_plugins.testing.leases import Handoff, claim, key_of
from disagg_plugins.testing.pace import Job, block_hashes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.testing.fake_engine import FakeEngine


class Answer(Protocol):
    """What is told how it gets on."""

    def begin(self) -> None:
        """The first token is there, or the whole answer where it is no stream."""
        ...

    def go_on(self) -> None:
        """More tokens are there."""
        ...


class Course:
    """How one answer comes about.

    Args:
        engine: The worker.
        answer: Is told.
        params: The request's ``kv_transfer_params``: this project's form or NIXL's.
        prompt: What the blocks of the prefix cache are made of.
        prompt_tokens: Its length.
        tokens: Tokens of the answer.
        stream: Whether it is told token by token.

    Attributes:
        prefill: The request is the first half of a split one.
        decode: It is the second half.
        ready: Tokens that are there.
        kv: What stands for the KV of a handoff that was taken over.
    """

    def __init__(
        self,
        engine: FakeEngine,
        answer: Answer,
        params: Mapping[str, object],
        *,
        prompt: bytes,
        prompt_tokens: int,
        tokens: int,
        stream: bool,
    ) -> None:
        self._engine = engine
        self._answer = answer
        self._params = params
        disagg = params.get("disagg")
        self._disagg: Mapping[str, object] = disagg if isinstance(disagg, dict) else {}
        step = self._disagg.get("step")
        self.prefill = step == "prefill" or bool(params.get("do_remote_decode"))
        self.decode = step == "decode" or bool(params.get("do_remote_prefill"))
        self._prompt = prompt
        self._prompt_tokens = prompt_tokens
        self._tokens = tokens
        self._stream = stream and not self.prefill
        self._job: Job | None = None
        self._over = False
        self.ready = 0
        self.kv: int | None = None

    def start(self) -> None:
        """Take the handoff over, where there is one and that is modelled, then compute."""
        engine = self._engine
        handoff = self._handoff() if self.decode and engine.leases is not None else None
        if handoff is None:
            self._compute()
        else:
            engine.spawn(self._claim(handoff))

    def stop(self) -> None:
        """The client went, or the answer is complete."""
        self._over = True
        if self._job is not None and self._engine.pacer is not None:
            self._engine.pacer.drop(self._job)

    def publish(self, seed: int) -> dict[str, object]:
        """Keep the KV for a decode worker; return where it is, in words of both forms."""
        engine = self._engine
        key = key_of(str(self._disagg.get("ticket"))) if self._disagg else f"kv-{id(self)}"
        if engine.leases is None or not engine.leases.publish(key, seed):
            return {}
        return {"fake_key": key, "fake_port": engine.port}

    def _handoff(self) -> Handoff | None:
        where: Mapping[str, object] = self._params
        endpoints = self._disagg.get("endpoints")
        if isinstance(endpoints, list) and endpoints and isinstance(endpoints[0], dict):
            where = endpoints[0]
        port = where.get("fake_port")
        # the ticket that the gateway gave, not the name that the prefill worker told
        key = key_of(str(self._disagg["ticket"])) if self._disagg else str(where.get("fake_key"))
        return Handoff("127.0.0.1", port, key) if isinstance(port, int) else None

    async def _claim(self, handoff: Handoff) -> None:
        self.kv = await claim(handoff)
        self._engine.seen.claimed += self.kv is not None
        self._engine.seen.not_claimed += self.kv is None
        if not self._over:
            self._compute()

    def _compute(self) -> None:
        """Compute, or take the time that computing takes."""
        pacer = self._engine.pacer
        if pacer is None:
            self.ready = self._tokens
            self._answer.begin()
            return
        blocks = block_hashes(self._prompt, pacer.batch.profile.block_tokens)
        tokens = 1 if self.prefill else self._tokens
        self._job = Job(self._prompt_tokens, tokens, blocks, loaded=self.kv is not None)
        pacer.submit(self._job, self._token)

    def _token(self) -> None:
        """The worker wrote one more token."""
        self.ready += 1
        last = self.prefill or self.ready >= self._tokens
        if last and not self._stream:
            self.ready = self._tokens
            self._answer.begin()
        elif self._stream and self.ready == 1:
            self._answer.begin()
        elif self._stream and (last or self.ready % self._engine.stream_interval == 0):
            self._answer.go_on()
