"""Every hook of the project: the whole contract of a plugin in one file.

A plugin is a module, or a class without constructor arguments, named by an entry point of the
group ``disagg_plugins``. It marks functions with ``disagg_plugins.hookimpl``::

    from disagg_plugins import hookimpl
    from disagg_plugins.types import SplitDecision

    @hookimpl
    def disagg_select_split(profile, fleet):
        if profile.tenant == "batch":
            return SplitDecision(False, "batch tenants stay local")
        return None

The kind of a hook shows in its name:

- ``disagg_register_*``: collects factories, once a process, when they are first needed.
- ``disagg_select_*``: asked one plugin after the other; the first answer that is not None wins.
- ``disagg_filter_*``, ``disagg_score_*``, ``disagg_nominate_*``: every plugin is asked; the core
  combines the answers.
- ``disagg_on_*``: told; the answer is ignored.

Rules for every hook: it is synchronous and does no I/O; it takes any subset of the arguments, by
name; wrappers are refused. Third-party plugins are asked in alphabetical order, the built-in
ones after them (``tryfirst`` and ``trylast`` move within that). A third-party call runs on a
thread of its plugin and must answer within ``plugins.deadline_s`` of the policy (hooks
``disagg_register_*`` and ``disagg_on_start`` within ``plugins.start_s``). A plugin that raises,
overruns or answers nonsense is named in the log, counted, and treated as if it had answered None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluggy import HookspecMarker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from disagg_plugins.cli.checks import Check
    from disagg_plugins.cli.command import Command
    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.handoff.interfaces import Transport
    from disagg_plugins.launch.interfaces import Launcher
    from disagg_plugins.placement.types import (
        Demand,
        Hardware,
        Inventory,
        ModelShape,
        Phase,
        PhaseEstimate,
        PhaseLoad,
        Placement,
        RoleChange,
        RoleLoad,
    )
    from disagg_plugins.policy import Policy
    from disagg_plugins.types import (
        FleetView,
        HandoffEvent,
        HandoffPair,
        Refusal,
        RequestProfile,
        Role,
        SplitDecision,
        TransportCapabilities,
        Worker,
    )

hookspec = HookspecMarker("disagg_plugins")

HOOKSPEC_VERSION = 1
"""Raised when a hook or an argument is removed, renamed or changes its meaning; additions keep it.

A plugin that needs a newer contract says so with ``requires_hookspec = 2`` beside its hooks and
is refused by an older host.
"""

# --------------------------------------------------------------------------------------
# Start and registration: once a process
# --------------------------------------------------------------------------------------


@hookspec
def disagg_on_start(policy: Policy) -> None:
    """Tell plugins the policy, before any hook that decides.

    A plugin finds its own settings in ``policy.plugins.settings[<its name>]``. One that raises
    here is switched off and listed among the failures.

    Called in: the gateway, the simulator and each rank of a worker (engine process).
    How often: once a process, and again when the policy is replaced.
    Answers: ignored.

    Example::

        @hookimpl
        def disagg_on_start(self, policy):
            self.limit = int(policy.plugins.settings.get("my-plugin", {}).get("limit", 8))
    """


@hookspec
def disagg_register_transports() -> Sequence[Transport] | None:
    """Offer ways to move KV between two workers.

    Called in: each rank of a worker (engine process) and ``disagg doctor``.
    How often: once a process, when transports are first needed.
    Answers: all; a name that is taken already is a failure of the later plugin.

    Returns:
        The transports; an empty sequence where this machine cannot run any. None means the same.

    Example::

        @hookimpl
        def disagg_register_transports():
            return [TcpTransport()]
    """


@hookspec
def disagg_register_dialects() -> Sequence[Dialect] | None:
    """Offer what the gateway speaks to an engine; one dialect an engine.

    Called in: the gateway and ``disagg doctor``.
    How often: once a process, at start.
    Answers: all; a name that is taken already is a failure of the later plugin.

    Returns:
        The dialects, named like ``engine`` of a worker in the policy. None: none.

    Example::

        @hookimpl
        def disagg_register_dialects():
            return [VllmDialect()]
    """


@hookspec
def disagg_register_launchers() -> Sequence[Launcher] | None:
    """Offer ways to start the workers that a policy describes.

    Called in: ``disagg up``.
    How often: once a process, at start.
    Answers: all; a name that is taken already is a failure of the later plugin.

    Returns:
        The launchers. None: none.

    Example::

        @hookimpl
        def disagg_register_launchers():
            return [VllmLauncher()]
    """


@hookspec
def disagg_register_checks() -> Sequence[Check] | None:
    """Offer checks for ``disagg doctor``: is this environment ready, and the fix if not.

    Called in: ``disagg doctor``.
    How often: once a process.
    Answers: all; a name that is taken already is a failure of the later plugin.

    Returns:
        The checks. None: none.

    Example::

        @hookimpl
        def disagg_register_checks():
            return [SharedMemoryCheck()]
    """


@hookspec
def disagg_register_commands() -> Sequence[Command] | None:
    """Offer subcommands of ``disagg``.

    Called in: the ``disagg`` command.
    How often: once a process, before the arguments are parsed: import heavy modules later.
    Answers: all; a name that is taken already is a failure of the later plugin.

    Returns:
        The commands. None: none.

    Example::

        @hookimpl
        def disagg_register_commands():
            return [TopCommand()]
    """


# --------------------------------------------------------------------------------------
# Scheduler: for each request, in this order
# --------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def disagg_select_admission(profile: RequestProfile, fleet: FleetView) -> Refusal | None:
    """Refuse a request, or let it pass.

    Called in: the gateway and the simulator.
    How often: once a request, first of all; not again when it is decided again, because it waited
    or a worker failed it. ``profile.queued_tokens`` says what waits before it.
    Answers: the first refusal wins; one plugin cannot admit what another refuses.

    Returns:
        The refusal, told to the client with its ``Retry-After``; None admits.

    Example::

        @hookimpl
        def disagg_select_admission(profile, fleet):
            if profile.tenant is None:
                return Refusal("no tenant", retry_after_s=60, status=429)
    """


@hookspec
def disagg_nominate_workers(
    profile: RequestProfile, role: Role, fleet: FleetView
) -> Sequence[str] | None:
    """Name workers that must be looked at for this part of the request.

    Where a role has more than twice ``scheduler.candidates`` healthy workers, filters and scorers
    see a random sample of that size: two random choices already level the load, and a decision
    costs no more in a larger fleet. A worker that stands out for another reason (it holds the
    prompt's prefix, or the session) is nominated. In smaller fleets all are looked at anyway, and
    this hook is not called.

    Called in: the gateway and the simulator.
    How often: as ``disagg_filter_workers``, before it, in large fleets.
    Answers: all, together. Names of workers that do not serve the role, or not now, are passed
    over.

    Returns:
        A few names of workers, at most 16; None: none.

    Example::

        @hookimpl
        def disagg_nominate_workers(self, profile):
            return self.holders.get(profile.session)
    """


@hookspec
def disagg_filter_workers(
    profile: RequestProfile,
    role: Role,
    workers: Sequence[Worker],
    fleet: FleetView,
    other: Worker | None,
) -> Sequence[Worker] | None:
    """Leave out workers that must not do this part of the request.

    ``other`` is the worker of the other part, where it is chosen already: decode is chosen first,
    then prefill.

    Called in: the gateway and the simulator.
    How often: once a request for the role decode; once more for prefill when it is split.
    Answers: all; a worker stays only where every answer holds it. Answers with workers that were
    not among ``workers`` are refused.

    Returns:
        The workers that may stay (perhaps none); None leaves nobody out.

    Example::

        @hookimpl
        def disagg_filter_workers(profile, workers):
            return [w for w in workers if w.labels.get("zone") == "a"]
    """


@hookspec
def disagg_score_workers(
    profile: RequestProfile,
    role: Role,
    workers: Sequence[Worker],
    fleet: FleetView,
    other: Worker | None,
) -> Mapping[str, float] | None:
    """Say how well each worker suits this part of the request, from 0 (badly) to 1 (best).

    ``other`` is as in ``disagg_filter_workers``.

    Called in: the gateway and the simulator.
    How often: as ``disagg_filter_workers``, after it.
    Answers: all; the core takes the mean, weighted by ``scheduler.weights`` of the policy (1 where
    a plugin is not named; a plugin of weight 0 is not asked).

    Returns:
        Worker name to score in [0, 1]; a worker left out gets no opinion. None: no opinion on any.

    Example::

        @hookimpl
        def disagg_score_workers(workers, fleet):
            return {w.name: 1 / (1 + fleet.load(w).failures) for w in workers}
    """


@hookspec(firstresult=True)
def disagg_select_worker(
    profile: RequestProfile, role: Role, scored: Mapping[str, float]
) -> str | None:
    """Choose the worker, given the combined scores.

    Called in: the gateway and the simulator.
    How often: as ``disagg_filter_workers``, after the scores.
    Answers: the first one wins; with no answer the highest score wins, and among equals the one
    chosen longest ago.

    Returns:
        A name that is a key of ``scored``; None leaves the choice to others.

    Example::

        @hookimpl
        def disagg_select_worker(profile, scored):
            return min(scored)
    """


@hookspec(firstresult=True)
def disagg_select_split(profile: RequestProfile, fleet: FleetView) -> SplitDecision | None:
    """Decide whether a request's prompt is read on a prefill worker.

    Called in: the gateway and the simulator.
    How often: once a request that can be split (``profile.unsplittable`` is None), after its
    decode worker was chosen.
    Answers: the first one wins; with no answer the request stays local.

    Returns:
        The decision with its reason, which the per-request record keeps; None: no opinion.

    Example::

        @hookimpl
        def disagg_select_split(profile, fleet):
            if profile.slo_class == "interactive":
                return SplitDecision(True, "interactive requests are always split")
    """


@hookspec
def disagg_score_queue(profile: RequestProfile) -> float | None:
    """Say how urgent a request is that waits for a prefill worker, from 0 to 1.

    Priorities and the shares of tenants come before it; ``scheduler.queue.order`` of the policy
    decides between equal scores. Who has waited ``scheduler.queue.ageing_s`` goes first whatever
    the score, so that a low one is no sentence.

    Called in: the gateway and the simulator.
    How often: once a request, when it starts to wait.
    Answers: all; weighted mean as for workers, 0.5 where nobody has an opinion. Higher scores are
    read first.

    Returns:
        A score in [0, 1]; None: no opinion.

    Example::

        @hookimpl
        def disagg_score_queue(profile):
            return 1 / (1 + profile.prompt_tokens / 1000)
    """


@hookspec
def disagg_on_request_end(record: Mapping[str, object]) -> None:
    """Tell plugins how a request ended.

    Called in: the gateway and the simulator.
    How often: once a request, after its last byte or its failure.
    Answers: ignored. ``record`` is the per-request record (route, reason, TTFT, bytes, ...),
    read-only; a value is made when it is asked for, so ask for what you need.

    Example::

        @hookimpl
        def disagg_on_request_end(record):
            seen[record["route"]] += 1
    """


# --------------------------------------------------------------------------------------
# KV connector: for each handoff
# --------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def disagg_select_transport(
    pair: HandoffPair, offered: Sequence[tuple[str, TransportCapabilities]]
) -> str | None:
    """Choose the transport of one handoff.

    ``offered`` holds what both sides can speak, in the policy's order of preference; ``pair``
    carries the fingerprints of both sides.

    Called in: each rank of a decode worker (engine process).
    How often: once a handoff and rank, before connecting; never for each layer or block.
    Answers: the first one wins; built in: the first offered that can reach the peer.

    Returns:
        A name in ``offered``; None: no opinion.

    Example::

        @hookimpl
        def disagg_select_transport(pair, offered):
            if pair.payload_bytes < 1 << 20 and "tcp" in dict(offered):
                return "tcp"
    """


@hookspec
def disagg_on_handoff(event: HandoffEvent) -> None:
    """Tell plugins of one step of a handoff.

    Called in: the process where the step happens: a rank of the prefill or of the decode worker.
    How often: a handful of times a handoff (see ``HandoffEvent.step``); never for each layer.
    Answers: ignored.

    Example::

        @hookimpl
        def disagg_on_handoff(event):
            steps[event.step] += 1
    """


# --------------------------------------------------------------------------------------
# Placement: most have no caller in this release; the arguments are in placement/types.py
# --------------------------------------------------------------------------------------


@hookspec
def disagg_register_hardware() -> Sequence[Hardware] | None:
    """Describe kinds of accelerators or hosts. No caller in this release.

    Called in: the placement commands.
    How often: once a process.
    Answers: all; a name that is taken already is a failure of the later plugin.

    Returns:
        The hardware kinds this plugin knows. None: none.

    Example::

        @hookimpl
        def disagg_register_hardware():
            return [Hardware("h100-sxm", 80 * 10**9, 3.35e12, {"bfloat16": 989e12}, 450e9, 50e9)]
    """


@hookspec(firstresult=True)
def disagg_select_estimate(
    phase: Phase, hardware: Hardware, model: ModelShape, load: PhaseLoad
) -> PhaseEstimate | None:
    """Estimate how one worker does in one phase under a load. No caller in this release.

    Called in: the placement commands and the simulator.
    How often: for each point of a search; thousands of times a run.
    Answers: the first one wins.

    Returns:
        The estimate; None: this plugin does not know the hardware or the model.

    Example::

        @hookimpl
        def disagg_select_estimate(phase, hardware, model, load):
            return measured.get((phase, hardware.name, model.name, load))
    """


@hookspec
def disagg_register_placements(demand: Demand, inventory: Inventory) -> Sequence[Placement] | None:
    """Propose how to lay out roles on the hardware at hand. No caller in this release.

    Called in: the placement commands.
    How often: once a search.
    Answers: all; equal proposals are taken once.

    Returns:
        Proposals within the inventory (perhaps none). None: none.

    Example::

        @hookimpl
        def disagg_register_placements(demand, inventory):
            return [all_on_one(inventory)]
    """


@hookspec
def disagg_score_placements(
    demand: Demand, placements: Sequence[Placement]
) -> Mapping[str, float] | None:
    """Rank proposals from 0 to 1. No caller in this release.

    Called in: the placement commands.
    How often: once a search, with the proposals of all plugins.
    Answers: all; weighted mean as for workers.

    Returns:
        Placement name to score in [0, 1]; None: no opinion.

    Example::

        @hookimpl
        def disagg_score_placements(placements):
            return {p.name: 1 / (1 + p.cost_per_hour) for p in placements}
    """


@hookspec(firstresult=True)
def disagg_select_rebalance(fleet: FleetView, loads: Mapping[Role, RoleLoad]) -> RoleChange | None:
    """Propose that one worker changes its role.

    ``fleet`` shows each worker in its current role; those that may change are ``movable``. The
    gateway refuses a change that would leave a role without a healthy worker, drains the worker
    first, and changes nothing again for ``scheduler.rebalance.hold_s``.

    Called in: the gateway, with ``scheduler.rebalance.enabled``.
    How often: once in ``scheduler.rebalance.every_s``; at most one worker changes at a time.
    Answers: the first one wins.

    Returns:
        The change with its reason; None: leave the fleet as it is.

    Example::

        @hookimpl
        def disagg_select_rebalance(fleet, loads):
            if loads[Role.PREFILL].queue_wait_p99_s > 5:
                return RoleChange("w3", Role.PREFILL, "prompts wait more than 5 s")
    """
