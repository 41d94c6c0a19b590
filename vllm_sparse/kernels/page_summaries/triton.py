"""Summaries of each page's keys in Triton: one program per page and KV head.

Programs have few warps, so that each thread adds many numbers and few sums cross threads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_key_block, product_tile
from vllm_sparse.kernels.page_summaries import reference
from vllm_sparse.kernels.page_summaries.reference import SummaryKind
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks
from vllm_sparse.step.rows import DecodeRows

# Numbers that a warp reads at once: 16 loads of 16 bytes per thread in bfloat16.
WARP_NUMBERS = 4096
LARGEST_FLOAT8 = tl.constexpr(reference.LARGEST_FLOAT8)
LARGEST_FLOAT16 = tl.constexpr(reference.LARGEST_FLOAT16)
LARGEST_CODE = tl.constexpr(reference.LARGEST_CODE)


@triton.jit
def _stored(b_number, p_summary):
    """Numbers that `p_summary` has room for: those of 8 bits end at `LARGEST_FLOAT8`."""
    if p_summary.dtype.element_ty == tl.float8e4nv:
        b_number = tl.clamp(b_number, -LARGEST_FLOAT8, LARGEST_FLOAT8)
    return b_number


@triton.jit
def _encode(
    cache_pointer,
    block_table_pointer,
    p_summary,
    context,
    i_page,
    i_kv_head,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUARTER_TILE: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Codes of one page of one head into bytes at `p_summary`, as `SummaryKind.content` lays them out."""
    quarter_size: tl.constexpr = HEAD_SIZE // 4
    p_number = p_summary.to(tl.pointer_type(tl.float16))
    o_token = tl.arange(0, PAGE)
    live = (o_token < context - i_page * PAGE)[:, None]
    o_quarter = tl.arange(0, QUARTER_TILE)
    in_quarter = o_quarter < quarter_size
    b_packed = tl.zeros([PAGE, QUARTER_TILE], tl.int32)
    for quarter in tl.static_range(4):
        o_dim = quarter * quarter_size + o_quarter
        b_key = load_key_block(
            cache_pointer,
            block_table_pointer,
            i_page * PAGE,
            context,
            i_kv_head,
            o_dim,
            in_quarter,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            PAGE,
        ).to(tl.float32)
        b_least = tl.min(tl.where(live, b_key, float("inf")), axis=0)
        b_least = tl.clamp(b_least, -LARGEST_FLOAT16, LARGEST_FLOAT16).to(tl.float16)
        b_largest = tl.max(tl.where(live, b_key, float("-inf")), axis=0)
        b_step = tl.minimum((b_largest - b_least.to(tl.float32)) / LARGEST_CODE, LARGEST_FLOAT16).to(tl.float16)
        tl.store(p_number + o_dim, b_least, mask=in_quarter)
        tl.store(p_number + HEAD_SIZE + o_dim, b_step, mask=in_quarter)
        b_inverse = tl.where(b_step > 0, 1 / tl.where(b_step > 0, b_step.to(tl.float32), 1.0), 0.0)
        b_code = tl.floor((b_key - b_least.to(tl.float32)[None, :]) * b_inverse[None, :] + 0.5)
        b_packed |= tl.clamp(b_code, 0.0, LARGEST_CODE * 1.0).to(tl.int32) << (2 * quarter)
    p_code = p_summary + 4 * HEAD_SIZE + o_token[:, None] * quarter_size + o_quarter[None, :]
    tl.store(p_code, b_packed.to(tl.uint8), mask=live & in_quarter[None, :])


@triton.jit
def _summarise(
    cache_pointer,
    block_table_pointer,
    p_summary,
    context,
    i_page,
    i_kv_head,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    BOUNDS: tl.constexpr,
    CODES: tl.constexpr,
):
    """Summarise one page of one head into `p_summary`."""
    if CODES:
        _encode(
            cache_pointer,
            block_table_pointer,
            p_summary,
            context,
            i_page,
            i_kv_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            HEAD_SIZE,
            HEAD_TILE // 4,
            PAGE,
        )
    else:
        o_dim = tl.arange(0, HEAD_TILE)
        in_head = o_dim < HEAD_SIZE
        b_key = load_key_block(
            cache_pointer,
            block_table_pointer,
            i_page * PAGE,
            context,
            i_kv_head,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            PAGE,
        ).to(tl.float32)
        live_tokens = tl.minimum(context - i_page * PAGE, PAGE)
        if BOUNDS:
            live = (tl.arange(0, PAGE) < live_tokens)[:, None]
            b_least = tl.min(tl.where(live, b_key, float("inf")), axis=0)
            b_largest = tl.max(tl.where(live, b_key, float("-inf")), axis=0)
            tl.store(p_summary + o_dim, _stored(b_least, p_summary), mask=in_head)
            tl.store(p_summary + HEAD_SIZE + o_dim, _stored(b_largest, p_summary), mask=in_head)
        else:
            tl.store(p_summary + o_dim, _stored(tl.sum(b_key, axis=0) / live_tokens, p_summary), mask=in_head)


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(
    do_not_specialize=["context", "first_page", "pages"], do_not_specialize_on_alignment=["block_table_pointer"]
)
def page_summaries_kernel(
    cache_pointer,
    block_table_pointer,
    summary_pointer,
    context,
    first_page,
    pages,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    BOUNDS: tl.constexpr,
    CODES: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED: tl.constexpr,
):
    """Summarise pages into a tensor by logical page, or if `STORED` by physical block."""
    i_page = first_page + tl.program_id(0)
    i_kv_head = tl.program_id(1)
    if STORED:
        pages_per_block = CACHE_BLOCK // PAGE
        block = tl.load(block_table_pointer + i_page // pages_per_block).to(tl.int64)
        i_summary = (block * tl.num_programs(1) + i_kv_head) * pages_per_block + i_page % pages_per_block
    else:
        i_summary = (i_kv_head * pages + i_page).to(tl.int64)
    _summarise(
        cache_pointer,
        block_table_pointer,
        summary_pointer + i_summary * WIDTH,
        context,
        i_page,
        i_kv_head,
        cache_block_stride,
        cache_head_stride,
        cache_token_stride,
        CACHE_BLOCK,
        HEAD_SIZE,
        HEAD_TILE,
        PAGE,
        BOUNDS,
        CODES,
    )


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["pages", "table_row_stride"], do_not_specialize_on_alignment=["block_table_pointer"])
def chunk_summaries_kernel(
    cache_pointer,
    block_table_pointer,
    summary_pointer,
    table_row_pointer,
    context_pointer,
    pages,
    table_row_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    BOUNDS: tl.constexpr,
    CODES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Summarise the pages of several requests by logical page."""
    i_page = tl.program_id(0)
    i_kv_head = tl.program_id(1)
    i_chunk = tl.program_id(2)
    context = tl.load(context_pointer + i_chunk)
    if i_page * PAGE < context:
        i_summary = ((i_kv_head * tl.num_programs(2) + i_chunk) * pages + i_page).to(tl.int64)
        _summarise(
            cache_pointer,
            block_table_pointer + tl.load(table_row_pointer + i_chunk).to(tl.int64) * table_row_stride,
            summary_pointer + i_summary * WIDTH,
            context,
            i_page,
            i_kv_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            HEAD_SIZE,
            HEAD_TILE,
            PAGE,
            BOUNDS,
            CODES,
        )


# The rows of a step outside of graphs may begin at any row of vLLM's block table.
@triton.jit(do_not_specialize_on_alignment=["block_table_pointer"])
def newest_summaries_kernel(
    cache_pointer,
    block_table_pointer,
    summary_pointer,
    context_pointer,
    table_row_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    BOUNDS: tl.constexpr,
    CODES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Summarise the block that holds each row's newest token, one program per page."""
    i_in_block = tl.program_id(0)
    i_kv_head = tl.program_id(1)
    i_row = tl.program_id(2).to(tl.int64)
    pages_per_block = CACHE_BLOCK // PAGE
    context = tl.load(context_pointer + i_row)
    p_table = block_table_pointer + i_row * table_row_stride
    last_block = (context - 1) // CACHE_BLOCK
    i_page = last_block * pages_per_block + i_in_block
    if (context > 0) & (i_page * PAGE < context):
        block = tl.load(p_table + last_block).to(tl.int64)
        i_summary = (block * tl.num_programs(1) + i_kv_head) * pages_per_block + i_in_block
        _summarise(
            cache_pointer,
            p_table,
            summary_pointer + i_summary * WIDTH,
            context,
            i_page,
            i_kv_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
            HEAD_SIZE,
            HEAD_TILE,
            PAGE,
            BOUNDS,
            CODES,
        )


def warps(page_tokens: int, head_tile: int) -> int:
    """Number of warps of a program."""
    return min(max(page_tokens * head_tile // WARP_NUMBERS, 1), 8)


def _constants(kv_cache: torch.Tensor, kind: SummaryKind) -> dict[str, Any]:
    """Compile-time constants of both kernels, and their number of warps."""
    head_size = kv_cache.shape[3] // 2
    head_tile = product_tile(head_size)
    return {
        "CACHE_BLOCK": kv_cache.shape[2],
        "HEAD_SIZE": head_size,
        "HEAD_TILE": head_tile,
        "PAGE": kind.page_tokens,
        "BOUNDS": kind.has_bounds,
        "CODES": kind.content == "codes",
        "WIDTH": kind.width(head_size),
        # Codes hold a page's packed numbers beside a quarter of its keys.
        "num_warps": 4 if kind.content == "codes" else warps(kind.page_tokens, head_tile),
    }


def _run(keys: PlainKeys, kind: SummaryKind, out: torch.Tensor, first_page: int, stored: bool) -> None:
    cache = keys.kv_cache
    pages = triton.cdiv(keys.seq_len, kind.page_tokens)
    page_summaries_kernel[(pages - first_page, keys.num_kv_heads)](
        cache,
        keys.block_table,
        out,
        keys.seq_len,
        first_page,
        pages,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        STORED=stored,
        **_constants(cache, kind),
    )


def page_summaries(keys: PlainKeys, kind: SummaryKind) -> torch.Tensor:
    """Equal to `reference.page_summaries` up to float32 rounding; arguments as there."""
    pages = triton.cdiv(keys.seq_len, kind.page_tokens)
    shape = keys.num_kv_heads, pages, kind.width(keys.head_size)
    dtype = kind.dtype(torch.float32) if kind.content == "codes" else torch.float32
    summaries = torch.empty(shape, dtype=dtype, device=keys.kv_cache.device)
    _run(keys, kind, summaries, 0, stored=False)
    return summaries


def chunk_summaries(chunks: PromptChunks, kind: SummaryKind) -> torch.Tensor:
    """Equal to `reference.chunk_summaries` up to float32 rounding, and anything past a context; arguments as there."""
    blocks, cache = chunks.blocks, chunks.keys[0].kv_cache
    pages = triton.cdiv(blocks.longest_seq_len, kind.page_tokens)
    shape = cache.shape[1], len(blocks.spans), pages, kind.width(cache.shape[3] // 2)
    summaries = torch.empty(shape, dtype=torch.float32, device=cache.device)
    chunk_summaries_kernel[(pages, shape[0], shape[1])](
        cache,
        chunks.block_table,
        summaries,
        blocks.table_row,
        blocks.seq_len,
        pages,
        chunks.block_table.stride(0),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        **_constants(cache, kind),
    )
    return summaries


def store_summaries(keys: PlainKeys, kind: SummaryKind, first_new_token: int) -> None:
    """Equal to `reference.store_summaries` up to rounding; arguments as there."""
    assert keys.summaries is not None
    first_page = first_new_token // keys.block_size_tokens * (keys.block_size_tokens // kind.page_tokens)
    _run(keys, kind, keys.summaries, first_page, stored=True)


def store_newest_summaries(rows: DecodeRows, kind: SummaryKind, summaries: torch.Tensor) -> None:
    """Store the summaries of the newest token of each row, as `store_summaries` does, in one launch for CUDA graphs.

    The whole block that holds the token is summarised, because at a request's first step it may be a copy of another
    request's block. Rows whose `seq_len` is 0 are left out. Rows that select only in later steps must not be
    left out, so their `seq_len` is not 0 here.

    Args:
        rows: the rows; the query is not read.
        kind: page size and what a summary holds; its pages divide the cache's blocks.
        summaries: ``[blocks, kv_heads, block_size / page_tokens, width]``, contiguous, written.
    """
    cache = rows.kv_cache
    newest_summaries_kernel[(cache.shape[2] // kind.page_tokens, cache.shape[1], rows.seq_lens.shape[0])](
        cache,
        rows.block_table,
        summaries,
        rows.seq_lens,
        rows.block_table.stride(0),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        **_constants(cache, kind),
    )
