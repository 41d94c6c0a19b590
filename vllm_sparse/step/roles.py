"""Roles of a layer in a decode step: what a row reads there, and whether it writes a list that layers read."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache


class Role(StrEnum):
    """What a decode row does in one attention layer.

    Attributes:
        number: the role on the device (`vllm_sparse.kernels.decode_roles`).
        reads_list: the row attends to the list that was written last, which may be this layer's own.
        writes_list: the row's method chooses a list here, for this layer or for those that follow.
        meaning: one sentence for people.
    """

    number: int
    reads_list: bool
    writes_list: bool
    meaning: str

    DENSE = "dense", 0, False, False, "reads everything"
    DENSE_AND_WRITE = "dense_and_write", 1, False, True, "reads everything; writes the list for the layers that follow"
    READ = "read", 2, True, False, "reads the list that was written last"
    WRITE_AND_READ = "write_and_read", 3, True, True, "writes a list and reads it"

    def __new__(cls, value: str, number: int, reads_list: bool, writes_list: bool, meaning: str) -> Role:
        """A member; its value is the name that policy files hold."""
        role = str.__new__(cls, value)
        role._value_ = value
        role.number, role.reads_list, role.writes_list, role.meaning = number, reads_list, writes_list, meaning
        return role

    # Tuples of roles are hashed in every layer of a step; Enum's own hash runs in Python.
    __hash__ = str.__hash__

    @property
    def reads_everything(self) -> bool:
        """The row attends to its whole context."""
        return not self.reads_list


@lru_cache(maxsize=1024)
def held_roles(roles: tuple[Role, ...], held: range) -> tuple[Role, ...]:
    """Layer roles of a decode row as one stage of a pipeline plays them.

    Layers of other stages do nothing here, and no list comes from them: the first layer that would read such a list
    chooses its own and reads it. A layer that reads everything does not choose for layers of another stage.

    Args:
        roles: of the model's layers.
        held: layers of this stage.
    """
    own = [role if layer in held else Role.DENSE for layer, role in enumerate(roles)]
    first = next((layer for layer in held if own[layer] is not Role.DENSE), None)
    if first is not None and own[first] is Role.READ:
        own[first] = Role.WRITE_AND_READ
    last = next((layer for layer in reversed(held) if own[layer] is not Role.DENSE), None)
    if last is not None and own[last] is Role.DENSE_AND_WRITE:
        own[last] = Role.DENSE
    return tuple(own)


@lru_cache(maxsize=1024)
def reading_layers(roles: Sequence[Role]) -> list[int]:
    """Layers in which a decode row reads a list.

    Args:
        roles: tuple of each layer's role.
    """
    return [layer for layer, role in enumerate(roles) if role.reads_list]
