"""Sparse prompt chunks: those of all requests of a step choose their page lists, then one launch attends over them.

A row is a row, whose request it belongs to makes no difference to the stock kernel. So chunks share a launch, whatever
their methods, if their lists have pages of one size and are shared by as many heads. What does not depend on queries
and keys is worked out once a step, in `plan_launches`: then a layer's share of the host is a few launches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.backend.guard import NO_GUARD
from vllm_sparse.kernels.page_list import launch_lists
from vllm_sparse.kernels.row_queries import gather_rows, scatter_rows
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.metrics.recall import RecallSample
from vllm_sparse.pages import PageList, empty_lists
from vllm_sparse.step.chunks import LaunchRows, PromptBlocks, PromptChunks, launch_rows, one_chunk, prompt_blocks
from vllm_sparse.step.launch import Executor, Launch

if TYPE_CHECKING:
    from vllm_sparse.backend.guard import StepGuard
    from vllm_sparse.backend.layer import LayerCall, LayerPlatform
    from vllm_sparse.methods.prefill import PrefillMethod
    from vllm_sparse.metrics import StepRecord
    from vllm_sparse.step.plan import PrefillRow


@dataclass(frozen=True)
class ChunkGroup:
    """Prompt chunks of one method with the same knobs, which choose together.

    Attributes:
        method: theirs.
        rows: the chunks.
        blocks: their query blocks.
        prepared: what the method has prepared for them.
    """

    method: PrefillMethod
    rows: tuple[PrefillRow, ...]
    blocks: PromptBlocks
    prepared: Any


@dataclass(frozen=True)
class ChunkLaunch:
    """Prompt chunks that attend in one launch.

    Attributes:
        groups: the chunks.
        rows: of all groups.
        page_size_tokens: of their lists.
        width: pages of the longest list.
    """

    groups: tuple[ChunkGroup, ...]
    rows: LaunchRows
    page_size_tokens: int
    width: int


def plan_launches(platform: LayerPlatform, call: LayerCall, rows: Sequence[PrefillRow]) -> list[ChunkLaunch]:
    """Sort prompt chunks into launches.

    Args:
        platform: of the layers; all are alike.
        call: of one of them.
        rows: the chunks.
    """
    device = call.query.device
    by_method: dict[PrefillMethod, list[PrefillRow]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    by_launch: dict[tuple[int, int], list[ChunkGroup]] = {}
    for method, members in by_method.items():
        blocks = prompt_blocks([row.span for row in members], method.query_block_tokens, device)
        prepared = method.prepare(blocks, [row.prompt_tokens for row in members])
        page_size = platform.prefill_page_size(method.page_tokens, call.block_size_tokens)
        list_heads = method.list_heads(platform.num_heads, platform.num_kv_heads)
        group = ChunkGroup(method, tuple(members), blocks, prepared)
        by_launch.setdefault((page_size, list_heads), []).append(group)
    return [
        ChunkLaunch(
            tuple(groups),
            launch_rows([group.blocks for group in groups], list_heads, platform.num_kv_heads, device),
            page_size,
            max(-(-group.blocks.longest_seq_len // page_size) for group in groups),
        )
        for (page_size, list_heads), groups in by_launch.items()
    ]


def serve_chunks(
    platform: LayerPlatform,
    call: LayerCall,
    launches: Sequence[ChunkLaunch],
    record: StepRecord,
    guard: StepGuard = NO_GUARD,
) -> None:
    """Serve the sparse prompt chunks of a step in one layer: choose, translate, attend.

    Args:
        platform: of the layer.
        call: of the layer.
        launches: of `plan_launches`.
        record: what is measured of the step.
        guard: of the step.
    """
    for launch in launches:
        lists = empty_lists(launch.rows.lists.shape[0], launch.width, launch.page_size_tokens, call.query.device)
        list_heads, first = launch.rows.list_heads, 0
        served = []
        for group in launch.groups:
            keys = tuple(platform.row_keys(call, row.span) for row in group.rows)
            chunks = PromptChunks(group.blocks, call.query, keys, call.block_table, call.scale)
            layers = [Layer(call.index, platform.first_query_head, row.prompt_tokens) for row in group.rows]
            of_group = _part(lists, slice(first, first + list_heads * group.blocks.blocks))
            first += list_heads * group.blocks.blocks
            with record.timer.serving("prefill", [group.method.name] * len(group.rows)):
                group.method.select_chunks(chunks, layers, group.prepared, of_group)
            served.append((group, chunks, of_group))
        names = [group.method.name for group in launch.groups for _ in group.rows]
        with record.timer.serving("prefill", names):
            executor = record.timer.executor(platform.executor(call.layer))
            _attend(
                executor,
                launch.rows,
                lists,
                call.query,
                call.output,
                call.kv_cache,
                call.block_table,
                call.scale,
            )
        for group, chunks, of_group in served:
            _observe(call, group, chunks, of_group, record, guard, platform.logits_soft_cap)


def _part(lists: PageList, rows: slice) -> PageList:
    return replace(lists, pages=lists.pages[rows], kept_tokens=lists.kept_tokens[rows])


def _observe(
    call: LayerCall,
    group: ChunkGroup,
    chunks: PromptChunks,
    lists: PageList,
    record: StepRecord,
    guard: StepGuard,
    soft_cap: float,
) -> None:
    """Measure what chunks have read."""
    method = group.method
    list_heads = lists.kept_tokens.shape[0] // group.blocks.blocks
    for number, row in enumerate(group.rows):
        of_chunk = group.blocks.lists_of(number, list_heads)
        record.count(call.index, row.span, lists.kept_tokens[of_chunk], method.query_block_tokens, list_heads)
        measured = record.measures_recall(call.index, row.span)
        if measured or row.guard is not None:
            sample = RecallSample(
                chunks.query_of(number),
                chunks.keys[number],
                _part(lists, of_chunk),
                method.query_block_tokens,
                chunks.scale,
                soft_cap,
            )
            if measured:
                record.metrics.observe_recall("prefill", method.name, sample)
            if row.guard is not None:
                guard.check_chunk(row.guard, call.index, method.name, sample)


@dataclass(frozen=True)
class PromptChunk:
    """One request's prompt chunk in one layer, attended alone.

    Attributes:
        query: ``[tokens, query_heads, head_size]``.
        output: likewise, written.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major.
        request_blocks: int32 ``[blocks]`` of the request.
        scale: softmax scale.
    """

    query: torch.Tensor
    output: torch.Tensor
    kv_cache: torch.Tensor
    request_blocks: torch.Tensor
    scale: float


def attend_prompt_chunk(executor: Executor, method: PrefillMethod, lists: PageList, chunk: PromptChunk) -> None:
    """Run the stock kernel over the lists of one prompt chunk, for tools that run without a server.

    Args:
        executor: the platform's.
        method: what chose the lists.
        lists: as `PrefillMethod.select` returns them.
        chunk: written.
    """
    tokens, query_heads, _ = chunk.query.shape
    kv_heads = chunk.kv_cache.shape[1]
    rows = prompt_chunk_rows(
        tokens, method.query_block_tokens, method.list_heads(query_heads, kv_heads), kv_heads, chunk.query.device
    )
    _attend(executor, rows, lists, chunk.query, chunk.output, chunk.kv_cache, chunk.request_blocks[None], chunk.scale)


@functools.lru_cache(maxsize=64)
def prompt_chunk_rows(
    tokens: int, query_block: int, list_heads: int, kv_heads: int, device: torch.device
) -> LaunchRows:
    """Rows of one prompt chunk.

    Args:
        tokens: of the prompt chunk.
        query_block: query tokens that share a list.
        list_heads: heads that have lists of their own.
        kv_heads: KV heads.
        device: of the result.
    """
    return launch_rows([one_chunk(tokens, tokens, query_block, device)], list_heads, kv_heads, device)


def _attend(
    executor: Executor,
    rows: LaunchRows,
    lists: PageList,
    query: torch.Tensor,
    output: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
) -> None:
    """Run the stock kernel over lists.

    Args:
        executor: the platform's.
        rows: of the launch.
        lists: of its chunks.
        query: ``[step tokens, query_heads, head_size]``.
        output: likewise, written where the chunks are.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``, head-major.
        block_table: int32 ``[batch, blocks]``.
        scale: softmax scale.
    """
    kv_heads, block_size = kv_cache.shape[1:3]
    physical = launch_lists(lists, rows, block_table, block_size, kv_heads)
    queries = gather_rows(query, rows)
    attended = torch.empty_like(queries)
    launch = Launch(
        rows.starts,
        rows.max_query_tokens,
        physical.pages,
        physical.kept_tokens,
        physical.page_size_tokens,
        rows.list_head,
    )
    executor.run(launch, queries, attended, kv_cache, scale)
    scatter_rows(attended, rows, output)
