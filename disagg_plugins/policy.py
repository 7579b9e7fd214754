"""The policy file: one YAML file that says everything an operator decides.

Every default of the project is written down here, the canary's in ``canary/policy``, and nowhere
else. Secrets never stand in the
file: ``secret`` names an environment variable or a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence  # noqa: TC003  # beside Counter, where it is looked for
from pathlib import Path  # noqa: TC003  # pydantic reads it when the models are made
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    model_validator,
)

from disagg_plugins.canary.policy import CanaryPolicy
from disagg_plugins.policy_section import Name as Name
from disagg_plugins.policy_section import Seconds as Seconds
from disagg_plugins.policy_section import SecretSource as SecretSource
from disagg_plugins.policy_section import Section as Section
from disagg_plugins.types import Role, Worker

MIB = 1 << 20

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
    role_switch: bool = Field(
        default=False,
        description="For role both: its server was started with role switching (SGLang: "
        "--enable-pd-role-switch), has one role at a time, decode at first, and may be told to "
        "take the other.",
    )
    kv_events: Annotated[str, AfterValidator(_publisher)] | None = Field(
        default=None,
        description="Where its engine publishes KV events (--kv-events-config): tcp://host:port, "
        "or ipc:///path on this host.",
    )
    kv_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1 << 40,
        description="Tokens that its KV cache holds, where its server does not say so itself (it "
        "does with this project's connector).",
    )
    launch: Launch | None = None

    @model_validator(mode="after")
    def _switches_both(self) -> WorkerPolicy:
        if self.role_switch and self.role is not Role.BOTH:
            raise ValueError("role_switch needs the role both: the worker is to have either role")
        return self

    def worker(self) -> Worker:
        """Return the worker as the scheduler sees it."""
        return Worker(
            self.name,
            self.url,
            self.engine,
            self.role,
            self.capacity,
            self.labels,
            role_switch=self.role_switch,
            kv_tokens=self.kv_tokens,
        )


class Fleet(Section):
    """The workers of one deployment."""

    workers: list[WorkerPolicy] = Field(default_factory=list, max_length=4096)
    watch: Path | None = Field(
        default=None,
        description="A file with more workers, a YAML list as in workers; the gateway follows its "
        "changes. Relative to the policy file.",
    )
    watch_s: Seconds = Field(default=2.0, description="How often the watched file is looked at.")

    @model_validator(mode="after")
    def _check(self) -> Fleet:
        refuse_twice(self.workers)
        if self.watch is not None:
            return self
        if not self.workers:
            raise ValueError("no worker: list some in workers, or name a file with watch")
        if not any(w.role.serves(Role.DECODE) for w in self.workers):
            raise ValueError("no worker has the role decode or both: nothing could answer")
        return self


def refuse_twice(workers: Sequence[WorkerPolicy]) -> None:
    """Refuse workers of which two have the same name or address.

    Raises:
        ValueError: Two have.
    """
    for what, values in (("name", [w.name for w in workers]), ("url", [w.url for w in workers])):
        twice = sorted(value for value, count in Counter(values).items() if count > 1)
        if twice:
            raise ValueError(f"two workers have the same {what}: {', '.join(twice)}")


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


class QueuePolicy(Section):
    """How requests wait for a prefill worker."""

    order: Literal["fifo", "shortest", "deadline"] = Field(
        default="fifo",
        description="Of requests of one priority and tenant: by arrival, by prompt length, or by "
        "arrival plus the TTFT bound of the SLO class, or the request's own deadline if that is "
        "sooner.",
    )
    prefills_per_worker: int | None = Field(
        default=None,
        ge=1,
        le=65_536,
        description="Prompts that a prefill worker reads at once; more wait at the gateway. None: "
        "as many as the worker's capacity.",
    )
    max_waiting: int = Field(
        default=1024,
        ge=0,
        le=65_536,
        description="Requests that wait; more get 503. 0: nobody waits, and what finds every "
        "prefill worker taken stays on a decode worker.",
    )
    max_wait_s: Seconds = Field(
        default=2.0,
        description="Then the request is not split: a decode worker does all of it, or it gets "
        "429 or 503 where none can.",
    )
    ageing_s: Seconds = Field(
        default=1.0,
        description="Who has waited this long goes before all who have not, whatever the order.",
    )


TenantName = Annotated[str, Field(min_length=1, max_length=128)]


class TenantPolicy(Section):
    """What one tenant may have; the tenant ``*`` stands for each that is not named."""

    max_requests: int | None = Field(
        default=None, ge=1, le=1_000_000, description="In flight; more get 429. None: any number."
    )
    prompt_tokens_per_s: float | None = Field(
        default=None,
        gt=0,
        le=1e12,
        description="Prompt tokens a second over time; more get 429. None: any number.",
    )
    burst_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Prompt tokens at once after a pause. None: ten seconds' worth.",
    )
    weight: float = Field(
        default=1.0,
        ge=0.001,
        le=1000,
        description="Share of the prefill slots that are waited for, by prompt tokens.",
    )
    priority: int = Field(
        default=0, ge=-1000, le=1000, description="Added to that of the SLO class."
    )


class AdmissionPolicy(Section):
    """When a request is refused at once."""

    refuse_over: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Refuse when every predicted TTFT is over so many times the SLO class's. "
        "None: never.",
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
        default=65_536,
        ge=64,
        le=1 << 30,
        description="Tokens believed cached on one worker whose room is not known. Too many cost "
        "more than too few: a prompt that is taken for cached is read on a decode worker.",
    )


class RebalancePolicy(Section):
    """Whether and when workers of role ``both`` change between prefill and decode."""

    enabled: bool = Field(default=False, description="Workers change their role with the load.")
    every_s: Seconds = Field(default=5.0, description="How often the load of the roles is judged.")
    high: float = Field(
        default=0.8, gt=0, le=1, description="A role of this utilisation or more wants a worker."
    )
    low: float = Field(
        default=0.4, ge=0, lt=1, description="A role of this utilisation or less can give one."
    )
    hold_s: Seconds = Field(default=60.0, description="Shortest time between two changes.")
    switch_s: Seconds = Field(
        default=30.0, description="A server that switches its role; then it rests."
    )

    @model_validator(mode="after")
    def _gap(self) -> RebalancePolicy:
        if self.low >= self.high:
            raise ValueError("low must be below high, or workers would change to and fro")
        return self


class SchedulerPolicy(Section):
    """Which rules decide, and how much each scorer weighs."""

    split: SplitPolicy = SplitPolicy()
    weights: dict[str, Annotated[float, Field(ge=0, le=1000)]] = Field(
        default_factory=dict,
        description="Plugin name -> weight of its scores. Where absent: least-loaded 1 (with the "
        "rule slo predicted-time 1, least-loaded 0.1), other built-in scorers 0, other packages 1.",
    )
    candidates: int = Field(
        default=4,
        ge=2,
        le=4096,
        description="Where a role has more than twice as many healthy workers, so many of them at "
        "random are compared for a request, and those that plugins nominate; else all.",
    )
    pick: Literal["max", "power-of-two", "weighted-random"] = Field(
        default="max",
        description="Which of the scored workers is taken: the best, the better of two at random, "
        "or one at random by its score.",
    )
    queue: QueuePolicy = QueuePolicy()
    tenants: dict[TenantName, TenantPolicy] = Field(
        default_factory=dict,
        max_length=4096,
        description="Tenant -> its limits and share. The tenant is the header x-disagg-tenant, "
        "else the field `user`. Without any, all requests wait as one tenant's.",
    )
    admission: AdmissionPolicy = AdmissionPolicy()
    rebalance: RebalancePolicy = RebalancePolicy()
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
    request_s: Seconds | None = Field(
        default=None,
        description="From a request's arrival to the end of its answer; a client asks for less "
        "with the header x-disagg-timeout (seconds). null: no bound.",
    )
    hedge_s: Seconds | None = Field(
        default=None,
        description="A request whose answer has not begun after this long is sent to a second "
        "decode worker too; the first to speak answers. It costs a second prompt, and counts as a "
        "retry. null: never.",
    )
    resume: bool = Field(
        default=True, description="Go on with a stream elsewhere when its decode worker dies."
    )
    resumes: int = Field(default=2, ge=0, description="How often one stream may go on elsewhere.")
    client_idle_s: Seconds = Field(default=75.0, description="Keep-alive of an idle client.")
    max_body_bytes: int = Field(
        default=4 * MIB, ge=1024, description="Largest request; reading 4 MiB takes up to 100 ms."
    )
    max_requests: int = Field(default=4096, ge=1, description="In flight; more get 503.")
    retry_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Requests that may be tried again, as a share of those of late: a fleet that "
        "fails as a whole is not asked twice for everything.",
    )
    retries_per_s: float = Field(
        default=10.0, ge=0, le=1e6, description="Retries that are allowed whatever that share."
    )
    drain_s: Seconds = Field(default=30.0, description="Grace for open requests at shutdown.")
    unhealthy_after: int = Field(
        default=3, ge=1, description="Failures in a row until a worker rests."
    )
    probe_s: Seconds = Field(default=2.0, description="Interval of health probes.")
    probe_generate_s: Seconds | None = Field(
        default=30.0,
        description="A worker that gave no sign of life for so long is asked for one token: "
        "servers answer health probes though their engine is dead. A worker that failed is asked "
        "with each probe. null: never.",
    )
    probe_generate_timeout_s: Seconds = Field(default=20.0, description="For that one token.")
    rest_s: Seconds = Field(
        default=2.0,
        description="A worker that fails again soon after it came back rests this long before it "
        "is probed; twice as long with each relapse.",
    )
    rest_max_s: Seconds = Field(default=60.0, description="The longest such rest.")
    slow_factor: float | None = Field(
        default=5.0,
        gt=1,
        le=1000,
        description="A worker so many times slower than its load explains, beside those of its "
        "role, engine and label `hardware`, rests too, at most a third of a role at once. Unlike "
        "machines need unlike labels. null: never.",
    )


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
    canary: CanaryPolicy | None = None


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
