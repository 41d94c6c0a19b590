"""What all parts of a scenario share: how its settings are checked, and the error that names a wrong one."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NotNegative = Annotated[float, Field(ge=0)]


class ScenarioError(Exception):
    """A scenario that cannot run, worded for its author."""


class Strict(BaseModel):
    """Settings of a scenario: unknown ones are refused, and so are numbers without an end."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
