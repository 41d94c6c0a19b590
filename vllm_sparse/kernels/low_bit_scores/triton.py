"""SALE's selection in Triton: one kernel quantises keys, one quantises rows and finds thresholds, one scores.

The score kernel never takes a maximum over the keys inside a tile. A tile holds one key from each of `PAGE_TILE` pages,
and the tiles of a page's 32 keys are combined element by element. So the largest integer of a scale group costs one
instruction per score, and its multiplication by the value of a level one instruction per eight scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_keys, shared_memory_kib
from vllm_sparse.kernels.low_bit_scores.reference import (
    KEY_GROUPS,
    PAGE_TOKENS,
    ROUNDING,
    ROUNDING_NATS,
    ROW_TILE,
    TINY,
    LowBitScoring,
    middle_end,
    top_level,
)
from vllm_sparse.keys import PlainKeys, readable_dtype

# Rows and pages of one tile of scores. With more rows each key is read less often.
SCORED_ROWS, PAGE_TILE = 128, 64
# Pages that one program of the score kernel compares with its rows.
SEGMENT_PAGES = 512


@triton.jit
def _levels(b_value, b_scale):
    """Nearest integers, halves rounded up."""
    return tl.floor(tl.div_rn(b_value, b_scale) + 0.5)


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["pages"])
def quantise_keys_kernel(
    cache_pointer,
    block_table_pointer,
    levels_pointer,
    mean_pointer,
    number_pointer,
    pages,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_LEVEL: tl.constexpr,
    MARGIN: tl.constexpr,
    TINY: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    i_page = tl.program_id(0)
    i_kv_head = tl.program_id(1)
    o_slot = tl.arange(0, PAGE)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    o_key = i_page * PAGE + o_slot
    b_key = load_keys(
        cache_pointer,
        block_table_pointer,
        o_key,
        o_key < pages * PAGE,
        i_kv_head,
        o_dim,
        in_head,
        cache_block_stride,
        cache_head_stride,
        cache_token_stride,
        CACHE_BLOCK,
    ).to(tl.float32)
    b_mean = (tl.sum(b_key, axis=0) / PAGE).to(mean_pointer.dtype.element_ty)
    i_out = i_kv_head.to(tl.int64) * pages + i_page
    tl.store(mean_pointer + i_out * HEAD_TILE + o_dim, b_mean)
    b_mean = b_mean.to(tl.float32)
    b_rest = b_key - b_mean[None, :]

    # Key 8a + 2g + b is member 2a + b of group g.
    o_group = o_slot % (2 * GROUPS) // 2
    o_member = o_slot // (2 * GROUPS) * 2 + o_slot % 2
    b_largest = tl.max(tl.abs(b_rest), axis=1)
    b_scale = tl.zeros([PAGE], tl.float32)
    p_number = number_pointer + i_kv_head.to(tl.int64) * (GROUPS + 2) * pages + i_page
    for group in tl.static_range(GROUPS):
        largest = tl.max(tl.where(o_group == group, b_largest, 0.0), axis=0)
        scale = tl.maximum(tl.div_rn(largest, TOP_LEVEL * 1.0), TINY)
        tl.store(p_number + group * pages, scale)
        b_scale = tl.where(o_group == group, scale, b_scale)
    b_level = _levels(b_rest, b_scale[:, None])
    o_level = (i_out * PAGE + o_group * (PAGE // GROUPS) + o_member) * HEAD_TILE
    tl.store(levels_pointer + o_level[:, None] + o_dim[None, :], b_level.to(tl.int8))

    radius = tl.sqrt(tl.max(tl.sum(b_rest * b_rest, axis=1), axis=0))
    rounding = (tl.sqrt(tl.sum(b_mean * b_mean, axis=0)) + radius) * ROUNDING
    error = rounding
    if MARGIN:
        b_error = b_rest - b_level * b_scale[:, None]
        error += tl.sqrt(tl.max(tl.sum(b_error * b_error, axis=1), axis=0))
    tl.store(p_number + GROUPS * pages, radius + rounding)
    tl.store(p_number + (GROUPS + 1) * pages, error)


def quantise_keys(keys: PlainKeys, pages: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.quantise_keys`.

    Returns:
        `levels` and `mean` as there, with channels padded with zeros to a power of two; and float32
        ``[kv_heads, 6, pages]``: the four groups' `scale`, then `radius` and `error`.
    """
    cache = keys.kv_cache
    head_tile = _head_tile(keys.head_size)
    shape = keys.num_kv_heads, pages
    levels = torch.empty(
        *shape, KEY_GROUPS, PAGE_TOKENS // KEY_GROUPS, head_tile, dtype=torch.int8, device=cache.device
    )
    mean = torch.empty(*shape, head_tile, dtype=readable_dtype(cache.dtype), device=cache.device)
    numbers = torch.empty(keys.num_kv_heads, KEY_GROUPS + 2, pages, dtype=torch.float32, device=cache.device)
    quantise_keys_kernel[(pages, keys.num_kv_heads)](
        cache,
        keys.block_table,
        levels,
        mean,
        numbers,
        pages,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        HEAD_SIZE=keys.head_size,
        HEAD_TILE=head_tile,
        PAGE=PAGE_TOKENS,
        GROUPS=KEY_GROUPS,
        TOP_LEVEL=top_level(bits),
        MARGIN=bits == 8,
        TINY=TINY,
        ROUNDING=ROUNDING,
        num_warps=4,
    )
    return levels, mean, numbers


@triton.jit
def _local_start(i_block, query_tokens, context, local_tokens, QUERY_BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """First page of a query block's local window."""
    first = context - query_tokens + i_block * QUERY_BLOCK
    end = tl.minimum(first + QUERY_BLOCK, context)
    return tl.minimum(tl.maximum(end - local_tokens, 0), first) // PAGE


@triton.jit(do_not_specialize=["query_tokens", "context", "sink_pages", "local_tokens"])
def rows_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    log_tau_pointer,
    levels_pointer,
    number_pointer,
    query_tokens,
    context,
    sink_pages,
    local_tokens,
    scale,
    query_row_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    ROW_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    TOP_LEVEL: tl.constexpr,
    MARGIN: tl.constexpr,
    TINY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROUNDING_NATS: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_head = tl.program_id(1)
    heads = tl.num_programs(1)
    o_row = i_block * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    live_row = o_row < query_tokens
    p_query = query_pointer + o_row.to(tl.int64)[:, None] * query_row_stride + i_head * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=live_row[:, None] & in_head[None, :], other=0.0)
    b_value = b_query.to(tl.float32)
    b_norm = tl.sqrt(tl.sum(b_value * b_value, axis=1))

    # Scores of the sink and the local window, one page at a time. Where the two overlap, a key is scored once.
    position = context - query_tokens + o_row
    last_page = tl.minimum(context - query_tokens + (i_block + 1) * QUERY_BLOCK, context) - 1
    last_page = last_page // PAGE
    local_start = _local_start(i_block, query_tokens, context, local_tokens, QUERY_BLOCK, PAGE)
    sinks = tl.minimum(sink_pages, local_start)
    b_maximum = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([QUERY_BLOCK], tl.float32)
    largest_key = 0.0
    for step in range(sinks + last_page - local_start + 1):
        i_page = tl.where(step < sinks, step, local_start + step - sinks)
        o_key = i_page * PAGE + tl.arange(0, PAGE)
        live_key = o_key < context
        b_key = load_keys(
            cache_pointer,
            block_table_pointer,
            o_key,
            live_key,
            i_head // GROUP,
            o_dim,
            in_head,
            cache_block_stride,
            cache_head_stride,
            cache_token_stride,
            CACHE_BLOCK,
        )
        # "ieee", because Triton would round float32 inputs to TF32.
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale
        b_score = tl.where(o_key[None, :] <= position[:, None], b_score, float("-inf"))
        # The first page holds key 0, which every row may read, so the maximum is finite from there on.
        b_next = tl.maximum(b_maximum, tl.max(b_score, axis=1))
        b_sum = b_sum * tl.exp(b_maximum - b_next) + tl.sum(tl.exp(b_score - b_next[:, None]), axis=1)
        b_maximum = b_next
        b_key = b_key.to(tl.float32)
        largest_key = tl.maximum(largest_key, tl.max(tl.sum(b_key * b_key, axis=1), axis=0))
    slack = b_norm * tl.sqrt(largest_key) * (scale * ROUNDING) + ROUNDING_NATS
    b_least = b_maximum + tl.log(b_sum) + tl.load(log_tau_pointer + i_head) - slack

    # The rows r and r + 8 of 16 share a scale.
    b_largest = tl.reshape(tl.max(tl.abs(b_value), axis=1), [QUERY_BLOCK // ROW_TILE, 2, ROW_TILE // 2])
    b_largest = tl.max(b_largest, axis=1, keep_dims=True)
    b_largest = tl.broadcast_to(b_largest, [QUERY_BLOCK // ROW_TILE, 2, ROW_TILE // 2])
    b_scale = tl.maximum(tl.div_rn(tl.reshape(b_largest, [QUERY_BLOCK]), TOP_LEVEL * 1.0), TINY)
    b_level = _levels(b_value, b_scale[:, None])
    b_error = tl.zeros([QUERY_BLOCK], tl.float32)
    if MARGIN:
        b_rest = b_value - b_level * b_scale[:, None]
        b_error = tl.sqrt(tl.sum(b_rest * b_rest, axis=1))
    o_out = i_head.to(tl.int64) * query_tokens + o_row
    tl.store(levels_pointer + o_out[:, None] * HEAD_TILE + o_dim[None, :], b_level.to(tl.int8), mask=live_row[:, None])
    numbers = heads.to(tl.int64) * query_tokens
    tl.store(number_pointer + o_out, b_least, mask=live_row)
    tl.store(number_pointer + numbers + o_out, b_scale, mask=live_row)
    tl.store(number_pointer + 2 * numbers + o_out, b_norm, mask=live_row)
    tl.store(number_pointer + 3 * numbers + o_out, b_error, mask=live_row)


def quantise_rows(
    query: torch.Tensor, keys: PlainKeys, scale: float, log_tau: torch.Tensor, scoring: LowBitScoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.thresholds` and `reference.quantise_queries`.

    Returns:
        `levels` with channels padded with zeros to a power of two; and float32 ``[4, heads, query_tokens]``: the
        results of `reference.thresholds`, then `scale`, `norm` and `error`.
    """
    query_block_tokens = scoring.query_block_tokens
    query_tokens, heads, head_size = query.shape
    cache = keys.kv_cache
    head_tile = _head_tile(head_size)
    levels = torch.empty(heads, query_tokens, head_tile, dtype=torch.int8, device=query.device)
    numbers = torch.empty(4, heads, query_tokens, dtype=torch.float32, device=query.device)
    rows_kernel[(triton.cdiv(query_tokens, query_block_tokens), heads)](
        query,
        cache,
        keys.block_table,
        log_tau,
        levels,
        numbers,
        query_tokens,
        keys.seq_len,
        scoring.sink_tokens // PAGE_TOKENS,
        scoring.local_tokens,
        scale,
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        GROUP=heads // keys.num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=head_tile,
        QUERY_BLOCK=query_block_tokens,
        ROW_TILE=ROW_TILE,
        PAGE=PAGE_TOKENS,
        TOP_LEVEL=top_level(scoring.bits),
        MARGIN=scoring.bits == 8,
        TINY=TINY,
        ROUNDING=ROUNDING,
        ROUNDING_NATS=ROUNDING_NATS,
        num_warps=query_block_tokens // 16,
    )
    return levels, numbers


@triton.jit(
    do_not_specialize=[
        "query_tokens",
        "context",
        "pages",
        "query_block_count",
        "key_blocks",
        "sink_pages",
        "local_tokens",
    ]
)
def scores_kernel(
    query_pointer,
    query_levels_pointer,
    row_number_pointer,
    key_levels_pointer,
    mean_pointer,
    page_number_pointer,
    kept_pointer,
    query_tokens,
    context,
    pages,
    query_block_count,
    key_blocks,
    sink_pages,
    local_tokens,
    scale,
    query_row_stride,
    query_head_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE_TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE_BOUNDS: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCKS * QUERY_BLOCK  # noqa: N806
    i_first_block = tl.program_id(0) * BLOCKS
    i_segment = tl.program_id(1) * SEGMENT
    i_head = tl.program_id(2)
    i_kv_head = (i_head // GROUP).to(tl.int64)
    o_block = i_first_block + tl.arange(0, BLOCKS)
    o_row = i_first_block * QUERY_BLOCK + tl.arange(0, ROWS)
    o_dim = tl.arange(0, HEAD_TILE)
    live_row = o_row < query_tokens
    b_local_start = _local_start(o_block, query_tokens, context, local_tokens, QUERY_BLOCK, PAGE)
    middle_end = tl.max(tl.where(o_block < query_block_count, b_local_start, 0), axis=0)

    p_query = query_pointer + o_row.to(tl.int64)[:, None] * query_row_stride + i_head * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=live_row[:, None] & (o_dim < HEAD_SIZE)[None, :], other=0.0)
    o_number = i_head.to(tl.int64) * query_tokens + o_row
    b_level = tl.load(
        query_levels_pointer + o_number[:, None] * HEAD_TILE + o_dim[None, :], mask=live_row[:, None], other=0
    )
    numbers = tl.num_programs(2).to(tl.int64) * query_tokens
    b_least = tl.load(row_number_pointer + o_number, mask=live_row, other=float("inf"))
    b_query_scale = tl.load(row_number_pointer + numbers + o_number, mask=live_row, other=0.0) * scale
    b_norm = tl.load(row_number_pointer + 2 * numbers + o_number, mask=live_row, other=0.0) * scale
    b_query_error = tl.load(row_number_pointer + 3 * numbers + o_number, mask=live_row, other=0.0) * scale

    for start in range(i_segment, tl.minimum(i_segment + SEGMENT, key_blocks), PAGE_TILE):
        o_page = start + tl.arange(0, PAGE_TILE)
        near = (o_page < sink_pages)[None, :] | (o_page[None, :] >= b_local_start[:, None])
        b_kept = near
        if start < middle_end:
            # Pages past the quantised ones are kept anyway, so what is read instead of them does not matter.
            o_read = i_kv_head * pages + tl.minimum(o_page, pages - 1)
            b_mean = tl.load(mean_pointer + o_read[:, None] * HEAD_TILE + o_dim[None, :])
            # Scores of the means, less the threshold of each row.
            b_above = tl.dot(b_query, tl.trans(b_mean), input_precision="ieee") * scale - b_least[:, None]
            p_number = page_number_pointer + i_kv_head * (GROUPS + 2) * pages + tl.minimum(o_page, pages - 1)
            b_radius = tl.load(p_number + GROUPS * pages)
            undecided = ~near
            if PAGE_BOUNDS:
                b_best_row = tl.max(tl.reshape(b_above, [BLOCKS, QUERY_BLOCK, PAGE_TILE]), axis=1)
                b_highest = b_above + b_norm[:, None] * b_radius[None, :]
                b_highest = tl.max(tl.reshape(b_highest, [BLOCKS, QUERY_BLOCK, PAGE_TILE]), axis=1)
                b_kept = near | (b_best_row > 0)
                undecided = ~b_kept & (b_highest > 0)
            if tl.max(tl.max(undecided.to(tl.int32), axis=1), axis=0) > 0:
                b_error = tl.load(p_number + (GROUPS + 1) * pages)
                # The most that rounding to levels may have lowered a score.
                b_above += b_norm[:, None] * b_error[None, :]
                b_above += b_query_error[:, None] * (b_radius + b_error)[None, :]
                b_best = tl.full([ROWS, PAGE_TILE], float("-inf"), tl.float32)
                p_level = key_levels_pointer + o_read[:, None] * (PAGE * HEAD_TILE) + o_dim[None, :]
                for group in range(GROUPS):
                    b_integer = tl.full([ROWS, PAGE_TILE], -(1 << 30), tl.int32)
                    for member in range(PAGE // GROUPS):
                        b_key = tl.load(p_level + (group * (PAGE // GROUPS) + member) * HEAD_TILE)
                        b_integer = tl.maximum(b_integer, tl.dot(b_level, tl.trans(b_key), out_dtype=tl.int32))
                    # First the best integer of the group, then its value.
                    b_key_scale = tl.load(p_number + group * pages)
                    b_best = tl.maximum(b_best, b_integer.to(tl.float32) * b_key_scale[None, :])
                b_above += b_best * b_query_scale[:, None]
                passing = tl.max(tl.reshape(b_above, [BLOCKS, QUERY_BLOCK, PAGE_TILE]), axis=1) > 0
                b_kept = b_kept | (undecided & passing)
        o_kept = (i_head * query_block_count + o_block).to(tl.int64)[:, None] * key_blocks + o_page[None, :]
        tl.store(
            kept_pointer + o_kept,
            b_kept.to(tl.uint8),
            mask=(o_block < query_block_count)[:, None] & (o_page < key_blocks)[None, :],
        )


def kept_map(
    query: torch.Tensor, keys: PlainKeys, scale: float, log_tau: torch.Tensor, scoring: LowBitScoring
) -> torch.Tensor:
    """Equal to `reference.kept_map` up to rounding; arguments as there, the context at least as long as the sink."""
    local_tokens, query_block_tokens = scoring.local_tokens, scoring.query_block_tokens
    query_tokens, heads, head_size = query.shape
    context = keys.seq_len
    query_block_count, key_blocks = triton.cdiv(query_tokens, query_block_tokens), triton.cdiv(context, PAGE_TOKENS)
    shape = heads, query_block_count, key_blocks
    pages = middle_end(query_tokens, context, local_tokens, query_block_tokens)
    if pages <= scoring.sink_tokens // PAGE_TOKENS:
        return torch.ones(shape, dtype=torch.bool, device=query.device)
    key_levels, mean, page_numbers = quantise_keys(keys, pages, scoring.bits)
    query_levels, row_numbers = quantise_rows(query, keys, scale, log_tau, scoring)
    kept = torch.empty(shape, dtype=torch.bool, device=query.device)
    blocks = SCORED_ROWS // query_block_tokens
    # Of wide heads several tiles of keys at once would need 128 KiB.
    stages = {"num_stages": 1} if head_size > 128 and shared_memory_kib() < 128 else {}
    scores_kernel[(triton.cdiv(query_block_count, blocks), triton.cdiv(key_blocks, SEGMENT_PAGES), heads)](
        query,
        query_levels,
        row_numbers,
        key_levels,
        mean,
        page_numbers,
        kept.view(torch.uint8),
        query_tokens,
        context,
        pages,
        query_block_count,
        key_blocks,
        scoring.sink_tokens // PAGE_TOKENS,
        local_tokens,
        scale,
        query.stride(0),
        query.stride(1),
        GROUP=heads // keys.num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=_head_tile(head_size),
        QUERY_BLOCK=query_block_tokens,
        BLOCKS=blocks,
        PAGE=PAGE_TOKENS,
        GROUPS=KEY_GROUPS,
        PAGE_TILE=PAGE_TILE,
        SEGMENT=SEGMENT_PAGES,
        PAGE_BOUNDS=scoring.page_bounds,
        num_warps=8,
        **stages,
    )
    return kept


def _head_tile(head_size: int) -> int:
    """Channels of a tile: a power of two, at least the 32 that integer tensor cores multiply at a time."""
    return max(1 << (head_size - 1).bit_length(), 32)
