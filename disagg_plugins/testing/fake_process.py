"""Fake engines as a process: ``python -m disagg_plugins.testing.fake_engine --port 8101``."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence

from disagg_plugins.telemetry.reports import Reporter
from disagg_plugins.testing.fake_engine import Behaviour, FakeEngine
from disagg_plugins.testing.pace import read_profile
from disagg_plugins.testing.pacer import Pacer


async def serve_all(engines: Sequence[FakeEngine]) -> None:
    """Serve many on the running loop until cancelled."""
    async with asyncio.TaskGroup() as tasks:
        for engine in engines:
            tasks.create_task(engine.serve())


def run() -> None:
    """Read the command line, then serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=None)
    parser.add_argument("--workers", type=int, default=1, help="on ports from --port-base on")
    parser.add_argument("--port-base", type=int, default=None)
    parser.add_argument("--model", default="fake-model")
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--chunk-s", type=float, default=0.0)
    parser.add_argument("--first-s", type=float, default=0.0)
    parser.add_argument("--profile", help="a name of pace.PROFILES or a JSON file")
    parser.add_argument("--speed", type=float, default=1.0, help="virtual seconds a second")
    parser.add_argument("--stream-interval", type=int, default=1, help="tokens of one piece")
    parser.add_argument("--lease-s", type=float, default=None, help="prefill keeps KV so long")
    parser.add_argument(
        "--reports-to",
        metavar="URL",
        help="a gateway that is told of handoffs; DISAGG_SECRET has the fleet's secret",
    )
    parser.add_argument("--name", help="of the worker in the policy, which reports carry")
    given = parser.parse_args()
    base = given.port if given.port is not None else given.port_base
    if base is None:
        parser.error("give --port, or --port-base with --workers")
    profile = read_profile(given.profile) if given.profile else None
    secret = os.environ.get("DISAGG_SECRET", "").strip().encode() if given.reports_to else None
    if given.reports_to and (not secret or not given.name or given.workers != 1):
        parser.error("--reports-to needs DISAGG_SECRET, and --name for one worker")
    engines = [
        FakeEngine(
            model=given.model,
            port=base + number,
            behaviour=Behaviour(tokens=given.tokens, chunk_s=given.chunk_s, first_s=given.first_s),
            secret=secret,
            reporter=Reporter(given.reports_to, secret, given.name) if secret else None,
            lease_s=given.lease_s,
            pacer=Pacer(profile, speed=given.speed) if profile is not None else None,
            stream_interval=given.stream_interval,
        )
        for number in range(given.workers)
    ]

    import uvloop

    uvloop.run(serve_all(engines))
