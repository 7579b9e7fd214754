"""What the sections of the policy file are made of."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  # pydantic reads it when the models are made
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


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
