"""Decode rows on a GPU: all rows of a step at once, what each does being read on the device.

In each layer at most three things are launched, whatever the rows: the stock kernel over the rows that read everything,
in which the others have length 0; the choice of each method that some row may choose by; and the stock kernel over the
lists, in which rows that read everything have length 0. The same launches serve any batch of one size, which is what a
CUDA graph needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeGuard

import numpy as np
import torch

from vllm_sparse.kernels.decode_roles import LayerContexts, RowSettings
from vllm_sparse.kernels.decode_roles.reference import ROLES
from vllm_sparse.methods.decode import READING_ROLES
from vllm_sparse.metrics.timing import ASIDE, ATTENTION, SELECTION, Mark, ignore
from vllm_sparse.step.launch import Executor, Launch
from vllm_sparse.step.rows import DecodeMemory, DecodeRows, RowsPlace, ServerSize, TokenLists

if TYPE_CHECKING:
    from vllm_sparse.kernels.page_summaries import SummaryKind
    from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod

# Columns of the settings that every method has; its knobs follow.
METHOD, LEAST_CONTEXT, SCORED, SLOT, FRESH, KNOBS = range(6)


class DenseAttention(Protocol):
    """The stock kernel over decode rows, each with a length of its own."""

    def __call__(self, query: torch.Tensor, context_tokens: torch.Tensor, output: torch.Tensor, /) -> None:
        """Attend.

        Args:
            query: ``[rows, query_heads, head_size]``.
            context_tokens: int32 ``[rows]``; rows of 0 read nothing, and their output is anything.
            output: as the query, written.
        """


@dataclass(frozen=True)
class RowSetting:
    """What the host says of a decode row.

    Attributes:
        method: the request's, or None for a dense row.
        least_context_tokens: the row is dense unless its context is longer.
        roles: of the layers.
        slot: place of the request in what methods keep from step to step.
        fresh: another request held the slot before this step.
    """

    method: BatchDecodeMethod | None
    least_context_tokens: int
    roles: tuple[str, ...]
    slot: int
    fresh: bool


@dataclass(frozen=True)
class LayerLaunches:
    """What is launched in a layer.

    Attributes:
        dense: the stock kernel over whole contexts.
        selecting: numbers of the methods by which rows may choose lists for later layers.
        choosing: numbers of the methods by which rows may choose lists to read here; some may be in both.
        reading: the stock kernel over lists.
    """

    dense: bool
    selecting: tuple[int, ...]
    choosing: tuple[int, ...]
    reading: bool


class DecodeBuffers:
    """What a server's decode steps keep on the device, at fixed addresses.

    Args:
        most_rows: rows of the largest step, at most 1024.
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
        self._said: list[RowSetting] = []
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

    def say(self, rows: Sequence[RowSetting]) -> None:
        """Copy what the host says of a step's rows to the device, without waiting for it; nothing if it holds that."""
        if list(rows) == self._said:
            return
        self._said = list(rows)
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
                row.least_context_tokens,
                row.method.scores_tokens,
                row.slot,
                row.fresh,
            )
            settings[index, KNOBS : KNOBS + len(knobs)] = knobs
            roles[index] = [ROLES.index(role) for role in row.roles]
        for target, values in ((self.settings, settings), (self.roles, roles)):
            # A copy without waiting needs memory that is not written again before it is read.
            staged = torch.from_numpy(values)
            staged = staged.pin_memory() if target.is_cuda else staged
            target[: len(rows)].copy_(staged, non_blocking=True)

    def serves(self, method: DecodeMethod | None) -> TypeGuard[BatchDecodeMethod]:
        """Whether rows of a request with this method are served at once."""
        number = self._numbers.get(type(method))
        if method is None or number is None:
            return False
        return self.methods[number].serves(method, self.size.context_tokens)

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
            # With the next layer's, which may read what is chosen here.
            roles = {
                (self._numbers[type(row.method)], row.roles[layer], row.roles[layer + 1 : layer + 2] == ("reuse",))
                for row in rows
                if row.method is not None
            }
            selecting = {n for n, role, reused in roles if role == "select" or (role == "choose" and reused)}
            choosing = {n for n, role, _ in roles if role == "choose"}
            reading = any(role in READING_ROLES for _, role, _ in roles)
            dense = not all_sparse or any(role in ("dense", "select") for _, role, _ in roles)
            layers.append(LayerLaunches(dense, tuple(sorted(selecting)), tuple(sorted(choosing)), reading))
        return layers


# Knobs that the settings have room for: as many as the method with most of them has.
MOST_KNOBS = 16


class DecodeStep:
    """The decode rows of one step, layer by layer.

    Args:
        buffers: what the rows' settings were said to.
        rows: in the step.
        launches: of each layer.
        context_tokens: int32 ``[rows]``; 0 for rows that pad the batch.
        block_table: int32 ``[rows, blocks]``.
        capacity_tokens: tokens that there is room to score.
    """

    def __init__(
        self,
        buffers: DecodeBuffers,
        rows: int,
        launches: Sequence[LayerLaunches],
        context_tokens: torch.Tensor,
        block_table: torch.Tensor,
        capacity_tokens: int,
    ) -> None:
        assert buffers.holds(rows, 1), "kernels would write past the buffers"
        lists = rows * buffers.size.kv_heads
        self.launches = launches
        self.context_tokens = context_tokens
        self.block_table = block_table
        self.capacity_tokens = capacity_tokens
        self.methods = buffers.methods
        self.memories = buffers.memories
        self.settings = buffers.settings[:rows]
        self.row_settings = RowSettings(
            self.settings[:, METHOD], self.settings[:, LEAST_CONTEXT], self.settings[:, SCORED], buffers.roles[:rows]
        )
        self.contexts = LayerContexts(
            buffers.contexts.starts[:rows],
            buffers.contexts.dense[:, :rows],
            buffers.contexts.members[:, :rows],
            buffers.contexts.choosing[..., :rows],
            buffers.contexts.kept_tokens[:, :lists],
        )
        self.lists = TokenLists(buffers.lists.slots[:lists], buffers.lists.kept_tokens[:lists])
        self.query_starts = buffers.query_starts[: lists + 1]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        output: torch.Tensor,
        executor: Executor,
        dense: DenseAttention,
        summaries: Mapping[SummaryKind, torch.Tensor],
        mark: Mark = ignore,
    ) -> None:
        """Attend in one layer; layers come in order.

        Args:
            layer: index of the attention layer.
            query: ``[rows, query_heads, head_size]`` of each row's newest token.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major (LBHNC).
            scale: softmax scale.
            output: as the query, written.
            executor: the stock kernel over lists.
            dense: the stock kernel over whole contexts.
            summaries: of the layer's pages, by physical block, of each kind that a method asks for.
            mark: of the layer, where it is timed; attention over whole contexts counts for nothing.
        """
        # Imported here: there is Triton only where there is a GPU.
        from vllm_sparse.kernels.decode_roles import triton as decode_roles

        launches = self.launches[layer]
        if layer == 0:
            mark(ASIDE)
            decode_roles.layer_contexts(self.row_settings, self.context_tokens, self.capacity_tokens, self.contexts)
            mark(SELECTION)
        if launches.dense:
            dense(query, self.contexts.dense[layer], output)
        if launches.dense or layer > 0:
            mark(ASIDE)
        numbers = sorted({*launches.selecting, *launches.choosing})
        for number in numbers:
            # Lengths that stand here are read here; rows that read everything leave theirs aside.
            here = number in launches.choosing
            lists = replace(self.lists, kept_tokens=self.contexts.kept_tokens[layer]) if here else self.lists
            self._choose(number, layer, query, kv_cache, scale, summaries, lists)
            if number in launches.selecting:
                choosing = self.contexts.choosing[number, layer]
                decode_roles.pass_on(self.row_settings, layer, choosing, lists.kept_tokens, self.contexts)
        if numbers:
            mark(SELECTION)
        if launches.reading:
            self._read(layer, query, kv_cache, scale, output, executor, launches.dense, mark)

    def _choose(
        self,
        number: int,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        summaries: Mapping[SummaryKind, torch.Tensor],
        lists: TokenLists,
    ) -> None:
        """Let rows choose by a method."""
        method = self.methods[number]
        rows = DecodeRows(query, kv_cache, self.block_table, self.contexts.choosing[number, layer], scale)
        place = RowsPlace(
            self.contexts.starts,
            self.capacity_tokens,
            self.settings[:, SLOT],
            self.settings[:, FRESH],
            self.contexts.members[number],
            layer,
            None if method.summaries is None else summaries[method.summaries],
            self.memories[method.name],
        )
        method.choose_rows(rows, self.settings[:, KNOBS:], place, lists)

    def _read(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        output: torch.Tensor,
        executor: Executor,
        merge: bool,
        mark: Mark,
    ) -> None:
        """Attend over the lists."""
        from vllm_sparse.kernels.decode_roles import triton as decode_roles

        kept_tokens = self.contexts.kept_tokens[layer]
        lists, head_size = kept_tokens.shape[0], query.shape[2]
        launch = Launch(self.query_starts, 1, self.lists.slots, kept_tokens, 1)
        sparse = torch.empty_like(query) if merge else output
        executor.run(launch, query.reshape(lists, -1, head_size), sparse.view(lists, -1, head_size), kv_cache, scale)
        mark(ATTENTION)
        if merge:
            decode_roles.take_sparse(self.contexts.dense[layer], sparse, output)
            mark(SELECTION)
