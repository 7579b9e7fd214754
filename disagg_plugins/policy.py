"""The policy file: one YAML file that says everything an operator decides.

Every default of the project is written down here and nowhere else. Secrets never stand in the
file: ``secret`` names an environment variable or a file.
"""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003  # pydantic reads it when the models are made
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)

from disagg_plugins.types import Role, Worker

MIB = 1 << 20
VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Port = Annotated[int, Field(ge=1, le=65_535)]


def _http_url(url: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"{url!r} is not of the form http://host:port")
    if parts.port is None:
        raise ValueError(f"{url!r} names no port: write http://{parts.hostname}:8000")
    return url.rstrip("/")


def _publisher(address: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(address)
    if parts.scheme == "ipc" and len(parts.path) > 1 and not parts.netloc:
        return address
    if parts.scheme != "tcp" or not parts.hostname or parts.port is None or "*" in address:
        raise ValueError(f"{address!r} is not of the form tcp://host:port or ipc:///path")
    if parts.path or parts.query or parts.username is not None:
        raise ValueError(f"{address!r} has more than tcp://host:port")
    return address


BYTE_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
BYTE_TEXT = r"^[0-9]+ *([KMGT]iB)?$"


def _byte_count(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,15}) *([KMGT]iB)?", value.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not a size: write 512MiB, 2GiB or a number of bytes")
    return int(match[1]) * BYTE_UNITS[(match[2] or "").upper()]


def _byte_schema(schema: dict[str, JsonValue]) -> None:
    number: dict[str, JsonValue] = {
        key: schema.pop(key) for key in ("type", "minimum") if key in schema
    }
    schema["anyOf"] = [number, {"type": "string", "pattern": BYTE_TEXT}]


ByteCount = Annotated[int, BeforeValidator(_byte_count)]
"""A number of bytes, in a file also with a unit: ``512MiB``."""


class Section(BaseModel):
    """A part of the policy; unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SecretSource(Section):
    """Where the shared secret comes from; exactly one of the two.

    The secret is at least 16 bytes after stripping white space at its ends.
    """

    env: (
        Annotated[
            str,
            Field(description="Name of an environment variable.", pattern=VARIABLE_NAME),
        ]
        | None
    ) = None
    file: Annotated[Path, Field(description="A file that holds only the secret.")] | None = None

    @model_validator(mode="after")
    def _one(self) -> SecretSource:
        if (self.env is None) == (self.file is None):
            raise ValueError("name exactly one of env and file")
        return self


class Launch(Section):
    """How ``disagg up`` starts one worker on this machine."""

    model: str = Field(description="Path or hub name of the model to load.")
    python: str = Field(
        default="python3",
        description="The interpreter that has the engine; a relative path starts at the policy.",
    )
    args: list[str] = Field(default_factory=list, description="More flags for the engine's server.")
    env: dict[str, str] = Field(default_factory=dict, description="More environment.")
    cpus: list[int] = Field(default_factory=list, description="Pin to these CPUs; empty: no pin.")
    start_s: Seconds = Field(
        default=300.0, description="From the start to healthy; then it failed."
    )
    stop_s: Seconds = Field(default=20.0, description="From SIGTERM to SIGKILL.")


class WorkerPolicy(Section):
    """One worker of the fleet."""

    name: Name
    url: Annotated[str, AfterValidator(_http_url)]
    engine: Name = "vllm"
    role: Role
    capacity: int = Field(default=64, ge=1, le=65_536, description="Requests given to it at once.")
    labels: dict[str, str] = Field(default_factory=dict)
    kv_events: Annotated[str, AfterValidator(_publisher)] | None = Field(
        default=None,
        description="Where its engine publishes KV events (--kv-events-config): tcp://host:port, "
        "or ipc:///path on this host.",
    )
    launch: Launch | None = None

    def worker(self) -> Worker:
        """Return the worker as the scheduler sees it."""
        return Worker(self.name, self.url, self.engine, self.role, self.capacity, self.labels)


class Fleet(Section):
    """The workers of one deployment."""

    workers: list[WorkerPolicy] = Field(min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _check(self) -> Fleet:
        for what, values in (
            ("name", [w.name for w in self.workers]),
            ("url", [w.url for w in self.workers]),
        ):
            twice = sorted({v for v in values if values.count(v) > 1})
            if twice:
                raise ValueError(f"two workers have the same {what}: {', '.join(twice)}")
        if not any(w.role.serves(Role.DECODE) for w in self.workers):
            raise ValueError("no worker has the role decode or both: nothing could answer")
        return self


SPLIT_RULES = ("threshold", "always", "never", "load", "slo")
"""The built-in plugins that decide when a request is split; one of them is asked."""

PICKERS = ("max", "power-of-two", "weighted-random")
"""Ways to take one of the scored workers; all but ``max`` are built-in plugins."""


class SplitPolicy(Section):
    """When a request is split."""

    rule: Literal["threshold", "always", "never", "load", "slo"] = Field(
        default="threshold",
        description="The built-in rule that is asked, after the plugins of other packages: prompt "
        "length, always, never, queues, or predicted TTFT and TPOT against the request's SLO.",
    )
    min_prompt_tokens: int = Field(
        default=256,
        ge=0,
        description="Shorter prompts stay on the decode worker: moving costs more than it saves.",
    )


class SloClass(Section):
    """What requests of one class are promised."""

    ttft_s: Seconds | None = Field(default=None, description="Bound on TTFT; None: none.")
    tpot_s: Seconds | None = Field(default=None, description="Bound on TPOT; None: none.")
    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher is more urgent.")


class PrefixPolicy(Section):
    """What is believed of a worker's prefix cache where its engine does not publish KV events."""

    ttl_s: Seconds = Field(
        default=300.0, description="A prompt is believed cached for this long after it was routed."
    )
    tokens: int = Field(
        default=262_144,
        ge=64,
        le=1 << 30,
        description="Tokens believed cached on one worker; less where its KV room is known.",
    )


DEFAULT_WEIGHTS = {
    "least-loaded": 1.0,
    "prefix-affinity": 0.0,
    "outstanding-tokens": 0.0,
    "kv-room": 0.0,
    "transfer-cost": 0.0,
    "session-affinity": 0.0,
}
"""Weights of the built-in scorers where the policy names none."""


class SchedulerPolicy(Section):
    """Which rules decide, and how much each scorer weighs."""

    split: SplitPolicy = SplitPolicy()
    weights: dict[str, Annotated[float, Field(ge=0, le=1000)]] = Field(
        default_factory=dict,
        description="Plugin name -> weight of its scores. Where absent: least-loaded 1, the other "
        "built-in scorers 0, those of other packages 1.",
    )
    candidates: int = Field(
        default=8,
        ge=2,
        le=4096,
        description="Workers of a role that are compared for a request; in a larger fleet so many "
        "at random, and those that plugins nominate.",
    )
    pick: Literal["max", "power-of-two", "weighted-random"] = Field(
        default="max",
        description="Which of the scored workers is taken: the best, the better of two at random, "
        "or one at random by its score.",
    )
    slo_classes: dict[Name, SloClass] = Field(
        default_factory=dict,
        max_length=64,
        description="Class name -> its bounds; a request names its class in x-disagg-slo-class.",
    )
    default_slo_class: Name | None = Field(
        default=None, description="Class of requests that name none; None: they have no SLO."
    )
    profile: Path | None = Field(
        default=None,
        description="How fast the workers are, from `disagg profile`; relative to the policy file.",
    )
    chars_per_token: float = Field(
        default=4.0, gt=0.1, le=100, description="Estimate of prompt length for text prompts."
    )
    tokenizer: Path | None = Field(
        default=None,
        description="The model's folder or tokenizer.json, to count prompts instead of estimating "
        "them; relative to the policy file. Needs the extra disagg-plugins[tokenizer].",
    )
    tokenizer_s: Seconds = Field(
        default=1.0, description="Counting one prompt; then its length is estimated."
    )
    prefix: PrefixPolicy = PrefixPolicy()
    labels: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="Tenant, or * for all others -> labels that its workers must have.",
    )


class HandoffPolicy(Section):
    """How KV travels."""

    transports: list[Name] = Field(
        default=["shm", "tcp"], min_length=1, description="In order of preference."
    )
    staging_bytes: ByteCount = Field(
        default=512 * MIB,
        ge=MIB,
        description="Bound on KV staged by one rank of a worker; 512MiB and 2GiB are understood.",
        json_schema_extra=_byte_schema,
    )
    staging_wait_s: Seconds = Field(
        default=2.0, description="How long a prefill waits for staging before it goes unpublished."
    )
    lease_s: Seconds = Field(
        default=30.0, description="A handoff nobody claims is freed after this."
    )
    ticket_s: Seconds = Field(default=120.0, description="A ticket is void after this.")
    connect_s: Seconds = Field(default=3.0, description="Connecting and the handshake.")
    read_s: Seconds = Field(default=10.0, description="Longest silence while reading KV.")
    load_s: Seconds = Field(default=30.0, description="Whole load of one request; then recompute.")
    listen_host: str = Field(
        default="127.0.0.1",
        description="Where prefill workers serve KV over tcp; loopback only by default.",
    )
    advertise_host: str | None = Field(
        default=None, description="What peers connect to, where it differs from listen_host."
    )
    max_connections: int = Field(
        default=512,
        ge=1,
        le=4096,
        description="Per listener: one for each decode rank and request that waits, and idle ones.",
    )


class GatewayPolicy(Section):
    """The front door."""

    host: str = "127.0.0.1"
    advertise_host: str | None = Field(
        default=None, description="Where workers send reports, where it differs from host."
    )
    port: Port = 8000
    connect_s: Seconds = Field(default=3.0, description="Connecting to a worker.")
    prefill_s: Seconds = Field(
        default=60.0, description="A prefill answer; then decode computes alone."
    )
    first_byte_s: Seconds = Field(default=120.0, description="First byte of a worker's answer.")
    idle_s: Seconds = Field(default=120.0, description="Longest silence inside an answer.")
    resume: bool = Field(
        default=True, description="Go on with a stream elsewhere when its decode worker dies."
    )
    resumes: int = Field(default=2, ge=0, description="How often one stream may go on elsewhere.")
    client_idle_s: Seconds = Field(default=75.0, description="Keep-alive of an idle client.")
    max_body_bytes: int = Field(
        default=4 * MIB, ge=1024, description="Largest request; reading 4 MiB takes up to 100 ms."
    )
    max_requests: int = Field(default=4096, ge=1, description="In flight; more get 503.")
    drain_s: Seconds = Field(default=30.0, description="Grace for open requests at shutdown.")
    unhealthy_after: int = Field(
        default=3, ge=1, description="Failures in a row until a worker rests."
    )
    probe_s: Seconds = Field(default=2.0, description="Interval of health probes.")


class PluginPolicy(Section):
    """Third-party plugins."""

    disabled: list[str] = Field(default_factory=list, description="Plugin names not to load.")
    deadline_s: Seconds = Field(default=0.05, description="Bound on one hook call.")
    start_s: Seconds = Field(
        default=10.0, description="Bound on importing a plugin and on each of its hooks at start."
    )
    strikes: int = Field(
        default=3,
        ge=1,
        description="Overruns until a plugin is switched off; 1,000 calls in time forgive one.",
    )
    settings: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict, description="Plugin name -> its own settings, handed to it at start."
    )


class TelemetryPolicy(Section):
    """Records and reports."""

    records: Path | None = Field(
        default=None, description="JSON lines, one a request; relative to the policy file."
    )
    report_wait_s: Seconds = Field(
        default=2.0, description="How long a record waits for the workers' reports."
    )


class Policy(Section):
    """The whole file."""

    version: Literal[1] = 1
    model: str | None = Field(
        default=None, description="The model name clients use; None: what the workers answer."
    )
    secret: SecretSource = SecretSource(env="DISAGG_SECRET")
    fleet: Fleet
    scheduler: SchedulerPolicy = SchedulerPolicy()
    handoff: HandoffPolicy = HandoffPolicy()
    gateway: GatewayPolicy = GatewayPolicy()
    plugins: PluginPolicy = PluginPolicy()
    telemetry: TelemetryPolicy = TelemetryPolicy()


def load_policy(path: str | Path) -> Policy:
    """Return the policy of a file; ``policy_file.read_policy`` also tells its warnings.

    Raises:
        ConfigError: The file cannot be read or something in it is wrong; the text lists
            everything found, with file, line and key.
    """
    from disagg_plugins.policy_file import read_policy

    return read_policy(path).policy


def policy_schema() -> dict[str, JsonValue]:
    """Return the JSON Schema of the policy file."""
    schema: dict[str, JsonValue] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Policy.model_json_schema(),
    }
    schema["title"] = "disagg-plugins policy"
    return schema
