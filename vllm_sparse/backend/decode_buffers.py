"""What a server's decode steps keep on the device, at addresses that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch

from vllm_sparse.host_copy import copy_to
from vllm_sparse.kernels.decode_roles import LayerContexts
from vllm_sparse.step.launch import LayerLaunches
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import DecodeMemory, ServerSize, TokenLists

if TYPE_CHECKING:
    from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod
    from vllm_sparse.step.requests import RowSetting

# Columns of the settings that every method has; its knobs follow.
METHOD, LEAST_CONTEXT, SCORED, SLOT, FRESH, KNOBS = range(6)
# Knobs that the settings have room for: as many as the method with most of them has.
MOST_KNOBS = 16


class DecodeBuffers:
    """What a server's decode steps keep on the device, at fixed addresses.

    Args:
        most_rows: rows of the largest step.
        size: of the server.
        methods: by which rows may choose, as the server's configuration sets them.
        list_tokens: tokens of the longest list.
        device: of the model.
        memories: what methods keep, by their names; allocated here if None.
    """

    def __init__(
        self,
        most_rows: int,
        size: ServerSize,
        methods: Sequence[BatchDecodeMethod],
        list_tokens: int,
        device: torch.device,
        memories: Mapping[str, DecodeMemory | None] | None = None,
    ) -> None:
        def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        num_layers, kv_heads = size.num_layers, size.kv_heads
        self.size = size
        self.methods = tuple(methods)
        self._numbers: dict[type, int] = {type(method): number for number, method in enumerate(methods)}
        if memories is None:
            memories = {method.name: method.allocate(size, device) for method in methods}
        self.memories = memories
        self._told: list[RowSetting] = []
        self.settings = integers(most_rows, KNOBS + MOST_KNOBS)
        self.settings[:, METHOD] = -1
        self.roles = integers(most_rows, num_layers, dtype=torch.int8)
        self.contexts = LayerContexts(
            integers(most_rows, dtype=torch.int64),
            integers(num_layers, most_rows),
            integers(len(methods), most_rows),
            integers(len(methods), num_layers, most_rows),
            integers(num_layers, most_rows * kv_heads),
        )
        self.lists = TokenLists(integers(most_rows * kv_heads, list_tokens), integers(most_rows * kv_heads))
        self.query_starts = torch.arange(most_rows * kv_heads + 1, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        """Of device memory."""
        contexts = self.contexts
        tensors = (
            *(self.settings, self.roles, self.query_starts, self.lists.slots, self.lists.kept_tokens),
            *(contexts.starts, contexts.dense, contexts.members, contexts.choosing, contexts.kept_tokens),
        )
        memories = sum(memory.bytes for memory in self.memories.values() if memory is not None)
        return memories + sum(tensor.nbytes for tensor in tensors)

    def tell(self, rows: Sequence[RowSetting]) -> None:
        """Copy the settings of a step's rows to the device without waiting for it; nothing if it holds them."""
        if list(rows) == self._told:
            return
        self._told = list(rows)
        settings = np.zeros((len(rows), self.settings.shape[1]), dtype=np.int32)
        roles = np.zeros((len(rows), self.roles.shape[1]), dtype=np.int8)
        settings[:, METHOD] = -1
        for index, row in enumerate(rows):
            if row.method is None:
                continue
            assert row.slot < self.size.requests, "kernels would write past what methods keep"
            knobs = row.method.row_knobs()
            settings[index, :KNOBS] = (
                self._numbers[type(row.method)],
                row.longest_dense_seq_len,
                row.method.scores_tokens,
                row.slot,
                row.fresh,
            )
            settings[index, KNOBS : KNOBS + len(knobs)] = knobs
            roles[index] = [role.number for role in row.roles]
        for target, values in ((self.settings, settings), (self.roles, roles)):
            copy_to(target[: len(rows)], torch.from_numpy(values))

    def serves(self, method: DecodeMethod | None) -> TypeGuard[BatchDecodeMethod]:
        """Whether rows of a request with this method are served at once."""
        number = self._numbers.get(type(method))
        if method is None or number is None:
            return False
        return self.methods[number].serves(method, self.size.max_seq_len)

    def holds(self, rows: int, list_tokens: int) -> bool:
        """Whether there is room for a step of so many rows with lists of so many tokens."""
        return rows <= self.settings.shape[0] and list_tokens <= self.lists.slots.shape[1]

    def for_step(self, rows: int, list_tokens: int) -> DecodeBuffers:
        """These, or larger ones for one step that they do not hold; what methods keep is the same."""
        if self.holds(rows, list_tokens):
            return self
        return DecodeBuffers(rows, self.size, self.methods, list_tokens, self.settings.device, self.memories)

    def launches(self, rows: Sequence[RowSetting], all_sparse: bool) -> list[LayerLaunches]:
        """What a step needs in each layer.

        Args:
            rows: with the settings that may occur in the step.
            all_sparse: no row is dense throughout, for want of a method or because its context is short.
        """
        layers = []
        for layer in range(self.roles.shape[1]):
            # With whether a later layer reads what is written here.
            roles = {
                (self._numbers[type(row.method)], row.roles[layer], _is_read_later(row.roles, layer))
                for row in rows
                if row.method is not None
            }
            ahead = {n for n, role, read_later in roles if role.writes_list and (read_later or role.reads_everything)}
            here = {n for n, role, _ in roles if role.writes_list and role.reads_list}
            reading = any(role.reads_list for _, role, _ in roles)
            dense = not all_sparse or any(role.reads_everything for _, role, _ in roles)
            layers.append(LayerLaunches(dense, tuple(sorted(ahead)), tuple(sorted(here)), reading))
        return layers

    def launches_of_any_roles(self) -> list[LayerLaunches]:
        """What a step of any of the methods needs in each layer, whatever role each row has there."""
        numbers = range(len(self.methods))
        ahead = tuple(number for number in numbers if self.methods[number].shares_lists)
        return [LayerLaunches(True, ahead, tuple(numbers), True)] * self.roles.shape[1]


@lru_cache(maxsize=4096)
def _is_read_later(roles: tuple[Role, ...], layer: int) -> bool:
    """Whether a list that is written in a layer is read in a later one; dense layers may lie between."""
    return next((role for role in roles[layer + 1 :] if role is not Role.DENSE), None) is Role.READ
