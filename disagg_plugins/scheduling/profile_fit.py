"""A profile from measured requests: one fit over all of them, and how good it is (no I/O)."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from disagg_plugins.scheduling.prediction import COEFFICIENTS, SCALES, SHARES, observations
from disagg_plugins.scheduling.profile_file import (
    DecodeProfile,
    HandoffProfile,
    PrefillProfile,
    Profile,
    ProfileEntry,
    Quality,
)
from disagg_plugins.scheduling.regression import LEAST_S, Regression

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from disagg_plugins.scheduling.prediction import Kind, Observation, Phase
    from disagg_plugins.scheduling.profile_file import PhaseProfile

LEAST_OBSERVATIONS = 12
"""Fewer say nothing of five coefficients; such a phase is left out of the profile."""

DIGITS = 6
"""Significant digits written; measurements have two or three."""

PROFILES: Mapping[Phase, Callable[..., PhaseProfile]] = {
    "prefill": PrefillProfile,
    "decode": DecodeProfile,
    "handoff": HandoffProfile,
}

Group = tuple[str, "Kind | None"]
"""A worker's name, or an empty string and the kind that several workers share."""


class ProfileFit:
    """Fits a profile to records.

    Args:
        kinds: Engine and hardware by worker name: these workers are fitted together. Others get an
            entry of their own.
    """

    def __init__(self, kinds: Mapping[str, Kind] | None = None) -> None:
        self._kinds = kinds or {}
        self._seen: defaultdict[tuple[Group, Phase], list[Observation]] = defaultdict(list)
        self._fits: dict[tuple[Group, Phase], Regression] = {}

    def take(self, record: Mapping[str, object]) -> int:
        """Take one record; returns how many times it told."""
        count = 0
        for seen in observations(record):
            kind = self._kinds.get(seen.worker)
            group: Group = ("", kind) if kind is not None else (seen.worker, None)
            self._seen[group, seen.phase].append(seen)
            count += 1
        return count

    def profile(self) -> tuple[Profile | None, list[str]]:
        """Return the profile, or None where too little was measured, and remarks for people."""
        remarks: list[str] = []
        entries: defaultdict[Group, dict[Phase, PhaseProfile]] = defaultdict(dict)
        for (group, phase), seen in sorted(self._seen.items(), key=lambda item: str(item[0])):
            name = _group_text(group)
            if len(seen) < LEAST_OBSERVATIONS:
                remarks.append(
                    f"{name}, {phase}: only {len(seen)} measured, at least "
                    f"{LEAST_OBSERVATIONS} are needed; left out"
                )
                continue
            fitted = fit_phase(phase, seen)
            entries[group][phase] = fitted
            if fitted.fit is not None:
                remarks.append(
                    f"{name}, {phase}: {len(seen)} measured, mean absolute percentage error "
                    f"{fitted.fit.error_percent:.1f} %"
                )
        if not entries:
            return None, remarks
        measured = [_entry(group, phases) for group, phases in entries.items()]
        return Profile(measured=measured), remarks


def fit_phase(phase: Phase, seen: Iterable[Observation]) -> PhaseProfile:
    """Return the coefficients that fit ``seen`` best, and how well they do."""
    seen = list(seen)
    fit = Regression(SCALES[phase], SHARES[phase], forgetting=1.0)
    for each in seen:
        fit.observe(each.features, each.seconds)
    fit.solve()
    errors = [
        abs(each.seconds - fit.predict(each.features)) / each.seconds
        for each in seen
        if each.seconds > LEAST_S
    ]
    error_percent = 100.0 * sum(errors) / len(errors) if errors else 0.0
    names = COEFFICIENTS[phase]
    values = {n: _rounded(v) for n, v in zip(names, fit.coefficients, strict=True)}
    quality = Quality(observations=len(seen), error_percent=round(error_percent, 2))
    return PROFILES[phase](**values, fit=quality)


def _entry(group: Group, phases: Mapping[Phase, PhaseProfile]) -> ProfileEntry:
    name, kind = group
    who = {"worker": name} if kind is None else {"engine": kind[0], "hardware": kind[1]}
    return ProfileEntry.model_validate({**who, **phases})


def _group_text(group: Group) -> str:
    name, kind = group
    if kind is None:
        return f"worker {name}"
    return f"engine {kind[0]}" + (f" on {kind[1]}" if kind[1] else "")


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
