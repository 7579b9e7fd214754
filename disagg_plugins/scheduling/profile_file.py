"""The profile: how fast workers were when somebody measured them, as a YAML file.

``disagg profile`` writes it from the records of a gateway, ``scheduler.profile`` of the policy
names it, and the predictor starts from it, so that a fleet decides well from its first request on.
All times are seconds; sizes are tokens and requests.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import Field, ValidationError, model_validator

from disagg_plugins.errors import ConfigError
from disagg_plugins.policy import Name, Section
from disagg_plugins.scheduling.prediction import COEFFICIENTS, Phase, Predictor
from disagg_plugins.yaml_source import MAX_FILE_BYTES, dotted, parse_yaml, read_bounded

if TYPE_CHECKING:
    from collections.abc import Sequence

Coefficient = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


class Quality(Section):
    """How well the coefficients fit what was measured; told to people, not used."""

    observations: int = Field(ge=0, description="Measured times behind the fit.")
    error_percent: float = Field(ge=0, description="Mean absolute percentage error over them.")


class PrefillProfile(Section):
    """The time to read a prompt, in seconds."""

    base_s: Coefficient = 0.0
    per_token_s: Coefficient = 0.0
    per_token_squared_s: Coefficient = 0.0
    per_queued_token_s: Coefficient = 0.0
    per_running_request_s: Coefficient = 0.0
    fit: Quality | None = None


class DecodeProfile(Section):
    """The time of one decode step, in seconds."""

    base_s: Coefficient = 0.0
    per_request_s: Coefficient = 0.0
    per_kv_token_s: Coefficient = 0.0
    per_read_token_s: Coefficient = 0.0
    fit: Quality | None = None


class HandoffProfile(Section):
    """The time from the end of reading to the first token on another worker, in seconds."""

    base_s: Coefficient = 0.0
    per_token_s: Coefficient = 0.0
    fit: Quality | None = None


PhaseProfile = PrefillProfile | DecodeProfile | HandoffProfile


class ProfileEntry(Section):
    """What was measured of one worker, or of all of one engine and hardware."""

    worker: Name | None = None
    engine: Name | None = None
    hardware: str = Field(default="", description="The workers' label `hardware`; empty: none.")
    prefill: PrefillProfile | None = None
    decode: DecodeProfile | None = None
    handoff: HandoffProfile | None = None

    @model_validator(mode="after")
    def _one(self) -> ProfileEntry:
        if (self.worker is None) == (self.engine is None):
            raise ValueError("name exactly one of worker and engine")
        return self

    def phases(self) -> Sequence[tuple[Phase, PhaseProfile]]:
        """Return the phases that were measured."""
        found: list[tuple[Phase, PhaseProfile]] = []
        if self.prefill is not None:
            found.append(("prefill", self.prefill))
        if self.decode is not None:
            found.append(("decode", self.decode))
        if self.handoff is not None:
            found.append(("handoff", self.handoff))
        return found


class Profile(Section):
    """The whole file."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    measured: list[ProfileEntry] = Field(min_length=1, max_length=8192)


def read_profile(path: str | Path) -> Profile:
    """Return the profile of a file.

    Raises:
        ConfigError: The file cannot be read or something in it is wrong; the text tells file, line
            and key of everything found.
    """
    content, _mode = read_bounded(Path(os.path.abspath(path)), MAX_FILE_BYTES, "profile")
    source = parse_yaml(content, str(path))
    try:
        return Profile.model_validate(source.data)
    except ValidationError as exc:
        errors = []
        for each in exc.errors(include_url=False):
            key = tuple(each["loc"])
            text = each["msg"][:1].lower() + each["msg"][1:]
            line = source.line(key)
            errors.append(ConfigError(text, file=source.file, line=line, key=dotted(key) or None))
        if len(errors) == 1:
            raise errors[0] from exc
        errors.sort(key=lambda error: error.line or 0)
        lines = "".join(f"\n  {error}" for error in errors)
        problem = f"{len(errors)} things are wrong in the profile:{lines}"
        raise ConfigError(problem, file=source.file) from exc


def seed(predictor: Predictor, profile: Profile) -> None:
    """Let ``predictor`` start from ``profile``: kinds of worker first, then the workers named."""
    for entry in sorted(profile.measured, key=lambda e: e.worker is not None):
        for phase, measured in entry.phases():
            values = [getattr(measured, name) for name in COEFFICIENTS[phase]]
            if entry.engine is not None:
                predictor.seed_kind((entry.engine, entry.hardware), phase, values)
            elif entry.worker is not None:
                predictor.seed_worker(entry.worker, phase, values)


def profile_text(profile: Profile) -> str:
    """Return the profile as YAML that ``read_profile`` understands."""
    plain = profile.model_dump(mode="json", exclude_none=True)
    text: str = yaml.safe_dump(plain, sort_keys=False)
    return text
