"""Decode rows that are served one by one: each writes its lists alone; those that read lists share launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.backend.execution import DecodeLaunch, gather_index
from vllm_sparse.host_copy import indices_on
from vllm_sparse.kernels.page_list import to_physical
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.metrics.recall import RecallSample
from vllm_sparse.pages import concatenate
from vllm_sparse.step.launch import Launch

if TYPE_CHECKING:
    from vllm_sparse.backend.execution import LayerWork, StepExecution
    from vllm_sparse.backend.layer import LayerCall, LayerPlatform
    from vllm_sparse.metrics.row_recall import Observe
    from vllm_sparse.step.launch import Executor
    from vllm_sparse.step.plan import DecodeRow


def serve_rows(platform: LayerPlatform, call: LayerCall, step: StepExecution, work: LayerWork) -> None:
    """Let rows write lists and read them in one layer.

    Args:
        platform: of the layer.
        call: of the layer.
        step: of the rows.
        work: of the layer.
    """
    record = step.record
    for row in work.writing:
        _write_list(platform, call, step, row)
    for row in work.reading:
        lists = step.list_of(row)
        record.count(call.index, row.span, lists.kept_tokens, 1, lists.kept_tokens.shape[0])
        observers: list[Observe] = []
        if record.measures_recall(call.index, row.span):
            observers.append(record.metrics.observe_recall)
        if step.guard.checks(call.index, row.span):
            observers.append(step.guard.observer(call.index))
        for observed in observers:
            newest = call.query[row.span.query_start].unsqueeze(0)
            keys = platform.row_keys(call, row.span)
            sample = RecallSample(newest, keys, lists, 1, call.scale, platform.logits_soft_cap)
            observed("decode", row.method.name, sample)
    if work.reading:
        with record.timer.serving("decode", [row.method.name for row in work.reading]):
            if work.launches is None:
                work.launches = _launches(platform, call, step, work)
            _read_lists(platform, call, work.launches, record.timer.executor(platform.executor(call.layer)))


def _write_list(platform: LayerPlatform, call: LayerCall, step: StepExecution, row: DecodeRow) -> None:
    keys = platform.row_keys(call, row.span)
    if row.method.summaries is not None:
        keys.summaries = platform.summaries.of(row.method.summaries, call.kv_cache)
    page_size = platform.decode_page_size(call.block_size_tokens)
    memory = row.memory.setdefault(call.index, LayerMemory(layer=call.index))
    with step.record.timer.serving("decode", [row.method.name]):
        lists = row.method.select(call.query[row.span.query_start], keys, call.scale, page_size, memory)
    step.write_list(row, lists)


def _launches(platform: LayerPlatform, call: LayerCall, step: StepExecution, work: LayerWork) -> list[DecodeLaunch]:
    """Launches over the lists of a layer's reading rows; layers of a cache group share a block table."""
    by_lists: dict[int, list[DecodeRow]] = {}
    for row in work.reading:
        by_lists.setdefault(step.list_of(row).pages.shape[0], []).append(row)
    device, kv_heads = call.block_table.device, platform.num_kv_heads
    launches = []
    for lists_per_request, members in by_lists.items():
        page_list = concatenate([step.list_of(row) for row in members])
        batch_rows = indices_on(device, [row.span.row for row in members])
        list_head = torch.arange(lists_per_request, device=device).repeat(len(members))
        pages = to_physical(
            page_list,
            call.block_table[batch_rows].repeat_interleave(lists_per_request, dim=0),
            list_head // (lists_per_request // kv_heads),
            call.block_size_tokens,
            kv_heads,
        )
        starts = torch.arange(page_list.kept_tokens.shape[0] + 1, dtype=torch.int32, device=device)
        tokens = gather_index([row.span.query_start for row in members], device)
        launch = Launch(starts, 1, pages, page_list.kept_tokens, page_list.page_size_tokens, list_head)
        launches.append(DecodeLaunch(tokens, launch))
    return launches


def _read_lists(platform: LayerPlatform, call: LayerCall, launches: list[DecodeLaunch], executor: Executor) -> None:
    """Attend over the lists."""
    head_size = call.query.shape[-1]
    for part in launches:
        rows = part.launch.kept_tokens.shape[0]
        queries = call.query[part.tokens].reshape(rows, -1, head_size)
        if isinstance(part.tokens, slice):
            # Adjacent rows: the kernel writes in place.
            target = call.output[part.tokens].view(rows, -1, head_size)
            executor.run(part.launch, queries, target, call.kv_cache, call.scale)
        else:
            target = torch.empty_like(queries)
            executor.run(part.launch, queries, target, call.kv_cache, call.scale)
            call.output[part.tokens] = target.view(-1, platform.num_heads, head_size)
