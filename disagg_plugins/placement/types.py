"""The nouns of the placement hooks, as frozen dataclasses.

Times are seconds, sizes bytes or tokens, rates per second. Every rate is of one worker unless its
name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from disagg_plugins.types import Role

Phase = Literal["prefill", "decode"]
"""Reading the prompt, or writing the answer."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of accelerator, or a host that computes on its CPU.

    Attributes:
        name: Unique, lower case: ``h100-sxm``, ``epyc-9654``.
        memory_bytes: Memory for weights and KV of one device.
        memory_bytes_per_s: Bandwidth of that memory.
        flops_per_s: Dense peak by dtype, as the vendor states it: ``{"bfloat16": 989e12}``.
        device_link_bytes_per_s: Between two devices of one host, one direction.
        network_bytes_per_s: Between two hosts, one direction and device.
        devices_per_host: Devices that share a host.
        cost_per_hour: Of one device, in any one currency; 0 where cost does not matter.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    device_link_bytes_per_s: float
    network_bytes_per_s: float
    devices_per_host: int = 1
    cost_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What an estimate needs to know of a model.

    Attributes:
        name: As clients name it.
        weight_bytes: All weights, as loaded.
        active_parameters: Parameters used for one token (fewer than all in a mixture of experts).
        num_layers: Layers.
        kv_bytes_per_token: KV cache of one token over all layers and KV heads.
        dtype: Of the computation, a key of ``Hardware.flops_per_s``.
    """

    name: str
    weight_bytes: int
    active_parameters: int
    num_layers: int
    kv_bytes_per_token: int
    dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True)
class PhaseLoad:
    """The work of one worker in one phase.

    Attributes:
        batch_requests: Requests computed together.
        prompt_tokens: Mean prompt length.
        cached_prompt_tokens: Of these, the mean found in the worker's prefix cache.
        context_tokens: Mean tokens already in the KV cache of a decoding request.
        tp_size: Devices one worker is spread over.
    """

    batch_requests: float
    prompt_tokens: float
    cached_prompt_tokens: float = 0.0
    context_tokens: float = 0.0
    tp_size: int = 1


@dataclass(frozen=True, slots=True)
class PhaseEstimate:
    """How one worker does in one phase under a load.

    Attributes:
        step_s: Prefill: time to read one prompt. Decode: time of one step of the whole batch.
        tokens_per_s: Prompt tokens read, or output tokens written, by the worker.
        memory_bytes: Needed on each device.
        source: How the number came about: ``measured``, ``roofline``, the name of a table.
        relative_error: Half-width of the expected error as a share of ``step_s``; None: unknown.
    """

    step_s: float
    tokens_per_s: float
    memory_bytes: int
    source: str
    relative_error: float | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """What a deployment must serve.

    Attributes:
        model: The model.
        requests_per_s: Mean arrival rate of the whole deployment.
        prompt_tokens_p50: Median prompt length.
        prompt_tokens_p99: 99th percentile of prompt lengths.
        output_tokens_p50: Median answer length.
        output_tokens_p99: 99th percentile of answer lengths.
        ttft_slo_s: Bound on TTFT, or None.
        itl_slo_s: Bound on ITL, or None.
        attained_share: Share of requests that must meet every bound.
        prefix_hit_share: Share of prompt tokens expected in a prefix cache.
    """

    model: ModelShape
    requests_per_s: float
    prompt_tokens_p50: int
    prompt_tokens_p99: int
    output_tokens_p50: int
    output_tokens_p99: int
    ttft_slo_s: float | None = None
    itl_slo_s: float | None = None
    attained_share: float = 0.99
    prefix_hit_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Inventory:
    """What hardware there is.

    Attributes:
        hardware: The kinds, by name.
        devices: Devices at hand, by name of their kind.
    """

    hardware: Mapping[str, Hardware]
    devices: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class PlacedRole:
    """Workers of one role on one kind of hardware.

    Attributes:
        role: Their role.
        hardware: Name of the kind.
        workers: How many workers.
        tp_size: Devices of each worker.
    """

    role: Role
    hardware: str
    workers: int
    tp_size: int = 1


@dataclass(frozen=True, slots=True)
class Placement:
    """One proposal.

    Attributes:
        name: Unique among the proposals of a search; prefix it with the plugin's name.
        roles: What runs where.
        reason: Why it is proposed, in words.
        expected_goodput_requests_per_s: Requests a second that meet every bound; None: unknown.
        cost_per_hour: Of all devices used.
    """

    name: str
    roles: Sequence[PlacedRole]
    reason: str
    expected_goodput_requests_per_s: float | None = None
    cost_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class RoleLoad:
    """How busy the workers of one role were over the last window.

    Attributes:
        window_s: Length of the window.
        utilisation: Mean share of capacity in use, from 0 to 1.
        queue_wait_p99_s: 99th percentile of the wait before work began.
        requests_per_s: Requests ended.
        tokens_per_s: Prompt tokens read or output tokens written.
        slo_misses: Requests that missed a bound which this role answers for, by bound's name.
    """

    window_s: float
    utilisation: float
    queue_wait_p99_s: float
    requests_per_s: float
    tokens_per_s: float
    slo_misses: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoleChange:
    """One worker takes another role.

    Attributes:
        worker: Its name.
        role: The role it shall have.
        reason: Why, in words.
    """

    worker: str
    role: Role
    reason: str
