"""A request names its SLO class in a header; what no policy knows is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from disagg_plugins.gateway.intake import Intake
from disagg_plugins.gateway.openai import parse_request
from disagg_plugins.gateway.prompts import Prompts
from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.gateway.slo_classes import slo_class_of
from disagg_plugins.policy import Policy

if TYPE_CHECKING:
    from tests.gateway.harness import Stack

CLASSES = {"chat": {"ttft_s": 0.5, "tpot_s": 0.04, "priority": 5}, "batch": {}}


def gateway(**scheduler: object) -> SimpleNamespace:
    workers = [{"name": "d0", "url": "http://127.0.0.1:9", "role": "both"}]
    policy = Policy.model_validate({"fleet": {"workers": workers}, "scheduler": scheduler})
    return SimpleNamespace(
        policy=policy,
        fleet=SimpleNamespace(model=lambda: "m", dialects_here=tuple),
        metrics=None,
        prompts=Prompts(policy, None),
    )


def class_of(given: bytes | None, **scheduler: object) -> str | None:
    headers = [] if given is None else [(b"x-disagg-slo-class", given)]
    return slo_class_of(headers, gateway(**scheduler).policy.scheduler)


@pytest.mark.parametrize(
    ("given", "default", "found"),
    [(b"chat", None, "chat"), (b" batch ", "chat", "batch"), (None, "chat", "chat"), (None,) * 3],
)
def test_the_header_names_the_class_else_the_policy_does(
    given: bytes | None, default: str | None, found: str | None
) -> None:
    assert class_of(given, slo_classes=CLASSES, default_slo_class=default) == found


@pytest.mark.parametrize("given", [b"chats", b"", b"\xff\xfe", b"x" * 5000])
def test_an_unknown_class_is_refused_with_the_known_ones(given: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        class_of(given, slo_classes=CLASSES)
    assert caught.value.status == 400
    assert "known: chat, batch" in caught.value.message
    assert len(caught.value.message) < 500


def test_without_classes_the_answer_names_the_policy_key() -> None:
    with pytest.raises(RequestError, match="scheduler.slo_classes"):
        class_of(b"chat")


def test_the_profile_holds_the_bounds_of_the_class() -> None:
    parsed = parse_request(
        "/v1/completions", json.dumps({"prompt": "hello"}).encode(), chars_per_token=4.0
    )
    intake = Intake(gateway(slo_classes=CLASSES))  # type: ignore[arg-type]
    profile = intake.profile("r", parsed, 1.0, "chat")
    assert (profile.slo_class, profile.priority) == ("chat", 5)
    assert (profile.ttft_slo_s, profile.tpot_slo_s) == (0.5, 0.04)
    bare = intake.profile("r", parsed, 1.0)
    assert (bare.slo_class, bare.ttft_slo_s, bare.tpot_slo_s) == (None, None, None)


def test_a_client_hears_of_a_class_that_does_not_exist(build: Callable[..., Stack]) -> None:
    stack = build()
    body = {"model": "fake-model", "prompt": "hi", "max_tokens": 1}
    status, _, answer = stack.request(
        "POST", "/v1/completions", body, {"x-disagg-slo-class": "gold"}
    )
    assert status == 400
    assert "gold" in json.loads(answer)["error"]["message"]
