"""A request's way through a gateway with one prefill and one decode worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

LONG = "x"


def test_smoke(build: Callable[..., Any]) -> None:
    stack = build(reports=True)
    status, body = stack.complete()
    assert status == 200, body
    print(body, stack.engines["p0"].seen, stack.engines["d0"].seen)
    status, body = stack.complete(stream=True)
    print(body)
    print(stack.records(2))
    print(json.dumps(stack.status(), indent=1))
    assert LONG
