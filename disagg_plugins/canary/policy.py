"""The section ``canary`` of the policy file: what is tried, how fast, and what it may not do."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence  # noqa: TC003  # pydantic reads it when the models are made
from dataclasses import asdict
from datetime import date  # noqa: TC003  # as above
from pathlib import Path  # noqa: TC003  # as above
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from disagg_plugins.canary.assignment import Match
from disagg_plugins.canary.freeze import (
    DAYS,
    DateFreeze,
    Freeze,
    WeeklyFreeze,
    minutes,
    zone_named,
)
from disagg_plugins.canary.rollout import SKEW_S, Plan, steps_problem
from disagg_plugins.canary.shadow import Budget
from disagg_plugins.canary.shadow_headers import why_not_passed
from disagg_plugins.errors import ConfigError
from disagg_plugins.policy_section import VARIABLE_NAME, Name, Seconds, SecretSource, Section

if TYPE_CHECKING:
    from disagg_plugins.canary.case import Terms
    from disagg_plugins.canary.guardrail import Guardrail
    from disagg_plugins.canary.parity import Allowed

DAY_S = 86_400.0
MOST_RULES = 100
MOST_GUARDRAILS = 50
MOST_EDGES = 10
DSN_SOURCE = "write postgres: {env: NAME} or postgres: {file: PATH}"
HEADER_NAME = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}$"
PRIVATE_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie"})


def _time_of_day(value: object) -> object:
    # YAML 1.1 reads 18:00 as a number to the base of 60
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 100 * 60:
        value = f"{value // 60:02d}:{value % 60:02d}"
    if isinstance(value, str):
        minutes(value)
    return value


TimeOfDay = Annotated[str, BeforeValidator(_time_of_day)]


class GuardrailPolicy(Section):
    """What the candidate may not do; see ``disagg_plugins.canary.guardrail``."""

    metric: str = Field(description="What is watched: ttft, tpot, e2e, error_rate, ...")
    quantile: float | None = Field(
        default=None, description="0.95 for the p95 of a time; null for a share."
    )
    ratio: float = Field(
        default=1.0, description="What may be had of the baseline's: 1.25 gives 25 %."
    )
    slack: float = Field(default=0.0, description="What may be given besides, in its own unit.")
    limit: float | None = Field(
        default=None, description="A fixed limit in place of the baseline; works at 100 % too."
    )
    better: Literal["lower", "higher"] | None = Field(
        default=None, description="Which way is good; null: as the metric has it."
    )
    required: bool = Field(
        default=True, description="Whether a step waits for its proof; if not, it only rolls back."
    )
    min_samples: int = Field(
        default=100, ge=1, description="Requests of each arm before it says anything."
    )

    @model_validator(mode="after")
    def _possible(self) -> GuardrailPolicy:
        try:
            self.guardrail()
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
        return self

    def guardrail(self) -> Guardrail:
        """Return it as the statistics know it.

        Raises:
            ConfigError: It cannot be.
        """
        from disagg_plugins.canary.guardrail import Guardrail

        return Guardrail(**{name: getattr(self, name) for name in GuardrailPolicy.model_fields})


def default_guardrails() -> list[GuardrailPolicy]:
    """Return those for a monolith that becomes a split deployment.

    Required are those that some 4,000 of the candidate's requests a step decide, where both arms
    are alike. The others take longer, or see only requests that were split.
    """
    return [
        GuardrailPolicy(metric="error_rate", slack=0.01),
        GuardrailPolicy(metric="ttft", quantile=0.5, ratio=1.25),
        GuardrailPolicy(metric="ttft", quantile=0.95, ratio=1.25),
        GuardrailPolicy(metric="tpot", quantile=0.95, ratio=1.1),
        GuardrailPolicy(metric="ttft", quantile=0.99, ratio=1.5, required=False),
        GuardrailPolicy(metric="abandonment", slack=0.02, required=False),
        GuardrailPolicy(metric="error_rate", limit=0.05, required=False),
        GuardrailPolicy(metric="kv_failures", limit=0.05, required=False),
    ]


class FreezePolicy(Section):
    """When nothing is promoted: days of the week, or dates; rollback still works."""

    zone: str = Field(default="UTC", description="Time zone, as Europe/Berlin.")
    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] = Field(
        default_factory=list, description="On which the window begins, each week."
    )
    begin: TimeOfDay = Field(default="00:00", description="Of the window of those days.")
    end: TimeOfDay = Field(
        default="24:00", description="Not included; up to begin it is on the next day."
    )
    first: date | None = Field(default=None, description="First day, as 2026-12-20.")
    last: date | None = Field(default=None, description="Last day; it is frozen too.")

    @model_validator(mode="after")
    def _possible(self) -> FreezePolicy:
        try:
            zone_named(self.zone)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
        if bool(self.days) == (self.first is not None) or (self.first is None) != (
            self.last is None
        ):
            raise ValueError("name either days, with begin and end, or first and last")
        if self.first is not None and self.last is not None and self.last < self.first:
            raise ValueError(f"the last day {self.last} is before the first {self.first}")
        if self.first is not None and {"begin", "end"} & self.model_fields_set:
            raise ValueError("dates are whole days: begin and end go with days")
        return self

    def freeze(self) -> Freeze:
        """Return it as the rollout knows it."""
        zone = zone_named(self.zone)
        if self.first is not None and self.last is not None:
            return DateFreeze(self.first, self.last, zone)
        days = frozenset(DAYS.index(day) for day in self.days)
        return WeeklyFreeze(days, minutes(self.begin), minutes(self.end), zone)


class CanaryStorePolicy(Section):
    """Where the rollout is remembered; one of path and postgres."""

    path: Path | None = Field(
        default=None,
        description="A file on a local disk, for gateways of this machine; relative to the policy. "
        "null without postgres: canary.sqlite.",
    )
    postgres: SecretSource | None = Field(
        default=None, description="Where the DSN of a PostgreSQL stands, for gateways anywhere."
    )
    name: Name = Field(
        default="default", description="Of this canary: several may share a database."
    )
    lease_s: Annotated[float, Field(ge=1, le=3_600)] = Field(
        default=15.0, description="After so long without a sign another gateway decides."
    )
    busy_s: Annotated[float, Field(ge=0.1, le=60)] = Field(
        default=5.0, description="Longest wait for it."
    )

    @field_validator("path", "postgres", mode="before")
    @classmethod
    def _no_dsn(cls, value: object) -> object:
        # what stands there may hold a password, so it is not told
        if isinstance(value, str) and ("://" in value or "=" in value):
            raise ValueError("a DSN never stands in the policy: " + DSN_SOURCE)
        if isinstance(value, dict):
            env, file = value.get("env") or "NAME", value.get("file")
            named = isinstance(env, str) and re.fullmatch(VARIABLE_NAME, env)
            if not named or "://" in str(file):
                raise ValueError("a name is wanted, not the DSN itself: " + DSN_SOURCE)
        return value

    @model_validator(mode="after")
    def _one(self) -> CanaryStorePolicy:
        if self.path is not None and self.postgres is not None:
            raise ValueError("name one of path and postgres")
        return self


class HeaderMatch(Section):
    """A header that a request must have."""

    name: Annotated[str, Field(pattern=HEADER_NAME)]
    value: Annotated[str, Field(max_length=256)]

    @field_validator("name")
    @classmethod
    def _no_secret(cls, name: str) -> str:
        from disagg_plugins.credentials import looks_like_a_secret

        if name.lower() in PRIVATE_HEADERS or looks_like_a_secret(name):
            raise ValueError(f"{name} carries secrets, which never stand in the policy")
        return name.lower()


class RulePolicy(Section):
    """Requests that always go to one arm; all that is named must fit. The first that fits rules."""

    model: str | None = Field(default=None, description="The model that the request names.")
    header: HeaderMatch | None = Field(default=None, description="A header, with its value.")
    tenant: str | None = Field(default=None, description="Whose request it is.")
    arm: Literal["baseline", "candidate"] = Field(description="Where it goes.")

    @model_validator(mode="after")
    def _something(self) -> RulePolicy:
        if self.model is None and self.header is None and self.tenant is None:
            raise ValueError("name at least one of model, header and tenant")
        return self

    def match(self) -> Match:
        """Return it as the assignment knows it."""
        header = None if self.header is None else (self.header.name, self.header.value)
        return Match(self.arm, self.model, self.tenant, header)


class ParityPolicy(Section):
    """What the answers of copies may differ by, more than the baseline's from themselves."""

    margin: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.03, description="More of the pairs that may be different."
    )
    early_margin: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.02, description="More of them that may be so within the first 64 tokens."
    )
    drift_ratio: Annotated[float, Field(ge=1, le=1_000)] = Field(
        default=1.25, description="What the log-probabilities' median difference may be of theirs."
    )
    drift_floor: Annotated[float, Field(gt=0, le=100)] = Field(
        default=0.08, description="Up to this it is taken for rounding, as bfloat16 has it."
    )
    tie_gap: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.13,
        description="Tokens this near in log-probability are a tie; 0.13 is a step of bfloat16.",
    )
    prompt_tokens: Sequence[Annotated[int, Field(ge=1)]] = Field(
        default=(512, 2048, 8192),
        max_length=MOST_EDGES,
        description="Where the next bucket of prompts begins; each is judged by itself.",
    )
    min_pairs: int = Field(
        default=30,
        ge=1,
        description="Pairs of each kind in a bucket before it is judged; a step waits for them in "
        "the buckets with a fair share.",
    )
    fair_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.05,
        description="Buckets with so much of the pairs count: a step waits until they were looked "
        "at, not for the verdict ok. In others three answers must differ, and by more than chance, "
        "to hold it.",
    )

    @field_validator("prompt_tokens")
    @classmethod
    def _growing(cls, edges: Sequence[int]) -> Sequence[int]:
        if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError("the numbers of tokens must grow")
        return tuple(edges)

    def allowed(self) -> Allowed:
        """Return it as ``parity`` knows it."""
        from disagg_plugins.canary.parity import Allowed

        return Allowed(
            margin=self.margin,
            early_margin=self.early_margin,
            drift_ratio=self.drift_ratio,
            drift_floor=self.drift_floor,
            edges=tuple(self.prompt_tokens),
            min_pairs=self.min_pairs,
            fair_share=self.fair_share,
        )


class ShadowPolicy(Section):
    """Copies of the baseline's requests for the candidate, whose answers nobody gets."""

    share: float = Field(gt=0, le=1, description="Of the requests.")
    control: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5,
        description="Of the copies that go to the baseline again: how often it contradicts itself "
        "is what the candidate is measured by. 0: no parity is judged.",
    )
    max_in_flight: int = Field(default=8, ge=1, le=10_000, description="Copies at once.")
    timeout_s: Seconds = Field(default=60.0, description="Longest time of one copy.")
    max_per_s: float = Field(default=5.0, gt=0, le=100_000, description="Copies a second.")
    max_body_bytes: int = Field(
        default=1 << 20, ge=1, description="Larger requests are not copied."
    )
    headers: list[Annotated[str, Field(pattern=HEADER_NAME)]] = Field(
        default_factory=list,
        max_length=MOST_RULES,
        description="Of a request that its copy carries on; none that carries secrets.",
    )
    authorization: SecretSource | None = Field(
        default=None,
        description="Where the header authorization of the copies stands; null: they have none. "
        "That of the client is never passed on.",
    )
    parity: ParityPolicy = ParityPolicy()

    @field_validator("headers")
    @classmethod
    def _no_secret(cls, names: list[str]) -> list[str]:
        for name in names:
            if why := why_not_passed(name.lower()):
                raise ValueError(f"{name} {why}")
        return [name.lower() for name in names]

    def budget(self) -> Budget:
        """Return it as ``shadow`` knows it."""
        return Budget(
            share=self.share,
            control=self.control,
            max_in_flight=self.max_in_flight,
            max_per_s=self.max_per_s,
            timeout_s=self.timeout_s,
            max_body_bytes=self.max_body_bytes,
        )


def _store_section(value: object) -> object:
    if isinstance(value, str):
        # a string may be a DSN with its password, so it is not told
        raise ValueError("write store: {path: FILE} or store: {postgres: {env: NAME}}")
    return value


class CanaryPolicy(Section):
    """A second deployment beside the one of this file, and how traffic moves to it."""

    candidate: Path = Field(description="Its policy file; relative to this one.")
    steps: Sequence[int] = Field(
        default=(1, 5, 25, 50, 100), description="Percent of the traffic, growing, up to 100."
    )
    bake_s: Annotated[float, Field(ge=0, le=30 * DAY_S)] = Field(
        default=600.0, description="Least time at each step."
    )
    approval: Literal["automatic", "manual"] = Field(
        default="automatic", description="manual: a person approves each step after the first."
    )
    freeze: list[FreezePolicy] = Field(
        default_factory=list, max_length=100, description="When nothing is promoted."
    )
    horizon_s: Seconds = Field(
        default=600.0,
        description="A request that takes longer has failed: longer than the longest answer.",
    )
    level: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.05,
        description="Chance, over the whole rollout, that a good candidate is rolled back; also "
        "that a bad one passes.",
    )
    guardrails: list[GuardrailPolicy] = Field(
        default_factory=default_guardrails,
        max_length=MOST_GUARDRAILS,
        description="What the candidate may not do.",
    )
    store: Annotated[CanaryStorePolicy, BeforeValidator(_store_section)] = CanaryStorePolicy()
    look_s: Seconds = Field(default=5.0, description="Interval of looks at the evidence.")
    max_gap_s: Annotated[float, Field(ge=SKEW_S, le=30 * DAY_S)] = Field(
        default=300.0,
        description="If nobody looked for longer, or a clock leapt so far, a person must resume.",
    )
    sticky: Literal["session", "user", "tenant", "prefix", "request"] = Field(
        default="session",
        description="What stays at one arm. A request without it goes by its session or user, "
        "and else by itself.",
    )
    rules: list[RulePolicy] = Field(
        default_factory=list, max_length=MOST_RULES, description="Requests that go to a given arm."
    )
    shadow: ShadowPolicy | None = Field(default=None, description="null: no copies are sent.")

    @field_validator("steps")
    @classmethod
    def _growing(cls, steps: Sequence[int]) -> Sequence[int]:
        if problem := steps_problem(steps):
            raise ValueError(problem)
        return tuple(steps)

    @model_validator(mode="after")
    def _together(self) -> CanaryPolicy:
        from disagg_plugins.canary.guardrails import Guardrails

        try:
            Guardrails([g.guardrail() for g in self.guardrails], self.level)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
        if self.store.lease_s <= self.look_s:
            raise ValueError(
                f"store.lease_s ({self.store.lease_s:g}) must be more than look_s "
                f"({self.look_s:g}): the lease would end between two looks"
            )
        return self

    @property
    def _parity(self) -> Allowed | None:
        shadow = self.shadow
        return shadow.parity.allowed() if shadow is not None and shadow.control > 0.0 else None

    def terms(self, plan: Plan) -> Terms:
        """Return what the candidate is judged by at one step of a plan."""
        from disagg_plugins.canary.case import Terms

        guardrails = tuple(g.guardrail() for g in self.guardrails)
        return Terms(guardrails, plan.step_level(self.level), self._parity)

    def plan(self, candidate: bytes) -> Plan:
        """Return the plan of the rollout.

        Args:
            candidate: The candidate's policy file: another candidate needs other evidence.
        """
        told = {
            "steps": list(self.steps),
            "level": self.level,
            "horizon_s": self.horizon_s,
            "guardrails": [asdict(g.guardrail()) for g in self.guardrails],
            "parity": self._parity and asdict(self._parity),
            "candidate": hashlib.sha256(candidate).hexdigest(),
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return Plan(
            steps=tuple(self.steps),
            bake_s=self.bake_s,
            approval=self.approval == "manual",
            freezes=tuple(f.freeze() for f in self.freeze),
            max_gap_s=self.max_gap_s,
            fingerprint=digest,
        )
