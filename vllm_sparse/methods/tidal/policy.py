"""Roles of a model's layers in decoding, and the file that holds them: found by calibration, or written by hand.

A file written by hand needs the roles only: ``{"roles": ["dense", "dense", "dense_and_write", "read", ...]}``.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass as checked_dataclass

from vllm_sparse.methods.file import MethodFile, read
from vllm_sparse.methods.knobs import UNBOUNDED_TOKENS
from vllm_sparse.step.roles import Role

logger = logging.getLogger("vllm.sparse")

SHIPPED = Path(__file__).parent / "policies"
CHECKED = ConfigDict(extra="forbid", strict=True)
# Whether layers that write a list read it themselves says `selection_reads`, not their role.
ROLES = {role.value: role for role in (Role.DENSE, Role.DENSE_AND_WRITE, Role.READ)}
# Names in files of earlier releases.
FORMER_NAMES = {"select": Role.DENSE_AND_WRITE, "reuse": Role.READ}


def _role(name: object) -> Role:
    """A layer's role by its present or former name."""
    if isinstance(name, str) and name in FORMER_NAMES:
        _say_former_names()
        return FORMER_NAMES[name]
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"{name!r} is no role of a layer; {', '.join(ROLES)} are allowed")
    return ROLES[name]


@functools.lru_cache
def _say_former_names() -> None:
    """Once a process."""
    logger.warning(
        "A layer policy names roles as earlier releases did: select is dense_and_write now, reuse is read. "
        "The old names still work in this release; rewrite the file."
    )


PolicyRole = Annotated[Role, PlainValidator(_role)]


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
        positions: decoded tokens whose attention was measured, of all prompts.
        recall: of each layer, the share of the attention that its own list keeps which the list it reads keeps, of the
            head that loses most; null where it reads everything.
        divergence: Kullback-Leibler divergence from dense decoding, nats a token.
        same: share of tokens at which dense decoding's most likely one stays so.
    """

    model: str
    budget: int
    sink_tokens: int
    recent_tokens: int
    lists: str
    prompts: list[int]
    positions: int
    recall: list[float | None]
    divergence: float | None = None
    same: float | None = None


@checked_dataclass(frozen=True, config=CHECKED)
class Policy:
    """Contents of a policy file.

    Attributes:
        roles: of each layer: ``dense`` reads everything, ``dense_and_write`` too and writes a list, ``read`` reads the
            list that was written last.
        measured: what the policy was found with; absent if a person wrote it.
        budget_tokens: of a list, where neither the server nor a request says otherwise; absent: the method's default.
        selection_reads: what a layer that chooses reads itself, likewise.
        note: for people: where the policy comes from.
        version: of the format.
    """

    roles: list[PolicyRole]
    measured: Measured | None = None
    budget_tokens: Annotated[int, Field(ge=16, le=UNBOUNDED_TOKENS)] | None = None
    selection_reads: Literal["everything", "list"] | None = None
    note: str = ""
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        if Role.READ not in self.roles:
            raise ValueError("no layer has the role read, so every layer would be dense")
        first = self.roles.index(Role.READ)
        if Role.DENSE_AND_WRITE not in self.roles[:first]:
            raise ValueError(f"layer {first} has the role read, but no layer before it has the role dense_and_write")

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def shipped() -> list[str]:
    """Names of the policies that come with this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


@functools.lru_cache
def load(path: str) -> MethodFile[Policy]:
    """Read a policy, once per process: a file that changes under a running server changes nothing.

    Args:
        path: of the file, or the name of a policy that comes with this package.

    Raises:
        ValueError: it cannot be read or is no policy file.
    """
    return read(str(SHIPPED / f"{path}.json") if path in shipped() else path, Policy, "layer policy")
