"""Roles of a model's layers in decoding, and the file that holds them: found by calibration, or written by hand.

A file written by hand needs the roles only: ``{"roles": ["dense", "dense", "select", "reuse", ...]}``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from vllm_sparse.methods.file import MethodFile, read

Role = Literal["dense", "select", "reuse"]
CHECKED = ConfigDict(extra="forbid", strict=True)


@checked_dataclass(frozen=True, config=CHECKED)
class Measured:
    """What a policy was found with.

    Attributes:
        model: what was calibrated.
        budget: tokens of a list.
        sink_tokens: first tokens, forced into every list.
        recent_tokens: last tokens, likewise.
        lists: heads that share a list.
        prompts: tokens of each prompt.
        positions: last tokens of each prompt, whose attention was measured.
        recall: of each layer, the share of its attention that the list it reads keeps; null where it reads everything.
    """

    model: str
    budget: int
    sink_tokens: int
    recent_tokens: int
    lists: str
    prompts: list[int]
    positions: int
    recall: list[float | None]


@checked_dataclass(frozen=True, config=CHECKED)
class Policy:
    """Contents of a policy file.

    Attributes:
        roles: of each layer: ``dense`` reads everything, ``select`` too and chooses a list, ``reuse`` reads the list
            chosen last.
        measured: what the policy was found with; absent if a person wrote it.
        version: of the format.
    """

    roles: list[Role]
    measured: Measured | None = None
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        if "reuse" not in self.roles:
            raise ValueError("no layer has the role reuse, so every layer would be dense")
        first = self.roles.index("reuse")
        if "select" not in self.roles[:first]:
            raise ValueError(f"layer {first} has the role reuse, but no layer before it has the role select")

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


@functools.lru_cache
def load(path: str) -> MethodFile[Policy]:
    """Read a policy file, once per process: a file that changes under a running server changes nothing.

    Raises:
        ValueError: it cannot be read or is no policy file.
    """
    return read(path, Policy, "layer policy")
