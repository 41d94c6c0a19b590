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
    top_level,
)
from vllm_sparse.kernels.low_bit_scores.tables import BATCH_PAGES, TILE_ROWS, MiddlePages
from vllm_sparse.keys import readable_dtype
from vllm_sparse.step.chunks import PromptChunks

# Rows and pages of one tile of scores. With more rows each key is read less often.
SCORED_ROWS, PAGE_TILE = 128, 64
assert TILE_ROWS % SCORED_ROWS == 0
# Pages that one program of the score kernel compares with its rows.
SEGMENT_PAGES = 512


@triton.jit
def _levels(b_value, b_scale):
    """Nearest integers, halves rounded up."""
    return tl.floor(tl.div_rn(b_value, b_scale) + 0.5)


# Lengths change with every prompt chunk, tables begin anywhere, and so do a request's blocks in vLLM's block table;
# specialising on them would compile in the middle of serving.
@triton.jit(
    do_not_specialize=["first_page", "pages", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table_pointer", "batch_chunk_pointer"],
)
def quantise_keys_kernel(
    cache_pointer,
    block_table_pointer,
    levels_pointer,
    mean_pointer,
    number_pointer,
    batch_chunk_pointer,
    page_start_pointer,
    pages_pointer,
    table_row_pointer,
    first_page,
    pages,
    table_row_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    BATCH: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_LEVEL: tl.constexpr,
    MARGIN: tl.constexpr,
    TINY: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    # Pages of all chunks of the launch lie one chunk after another.
    i_stored = tl.program_id(0)
    i_kv_head = tl.program_id(1)
    i_chunk = tl.load(batch_chunk_pointer + i_stored // BATCH)
    i_page = first_page + i_stored - tl.load(page_start_pointer + i_chunk)
    # Those that fill up a chunk's last batch are quantised as if they held zeros, and never read.
    end = tl.load(pages_pointer + i_chunk) * PAGE
    p_table = block_table_pointer + tl.load(table_row_pointer + i_chunk).to(tl.int64) * table_row_stride
    o_slot = tl.arange(0, PAGE)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    o_key = i_page * PAGE + o_slot
    b_key = load_keys(
        cache_pointer,
        p_table,
        o_key,
        o_key < end,
        i_kv_head,
        o_dim,
        in_head,
        cache_block_stride,
        cache_head_stride,
        cache_token_stride,
        CACHE_BLOCK,
    ).to(tl.float32)
    b_mean = (tl.sum(b_key, axis=0) / PAGE).to(mean_pointer.dtype.element_ty)
    i_out = i_kv_head.to(tl.int64) * pages + i_stored
    tl.store(mean_pointer + i_out * HEAD_TILE + o_dim, b_mean)
    b_mean = b_mean.to(tl.float32)
    b_rest = b_key - b_mean[None, :]

    # Key 8a + 2g + b is member 2a + b of group g.
    o_group = o_slot % (2 * GROUPS) // 2
    o_member = o_slot // (2 * GROUPS) * 2 + o_slot % 2
    b_largest = tl.max(tl.abs(b_rest), axis=1)
    b_scale = tl.zeros([PAGE], tl.float32)
    p_number = number_pointer + i_kv_head.to(tl.int64) * (GROUPS + 2) * pages + i_stored
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


def quantise_keys(
    chunks: PromptChunks, middle: MiddlePages, part: range, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.quantise_keys`, the pages of some chunks one chunk after another.

    Args:
        chunks: the prompt chunks.
        middle: their tables.
        part: the chunks whose keys are quantised.
        bits: 4 or 8.

    Returns:
        `levels` and `mean` as there, with channels padded with zeros to a power of two; and float32
        ``[kv_heads, 6, pages]``: the four groups' `scale`, then `radius` and `error`. `pages` are those of `middle`
        from the part's first to its last.
    """
    keys, blocks = chunks.keys[0], chunks.blocks
    cache, head_tile = keys.kv_cache, _head_tile(keys.head_size)
    first_page = middle.starts[part.start]
    pages = middle.starts[part.stop] - first_page
    batches = slice(first_page // BATCH_PAGES, middle.starts[part.stop] // BATCH_PAGES)
    shape = keys.num_kv_heads, pages
    levels = torch.empty(
        *shape, KEY_GROUPS, PAGE_TOKENS // KEY_GROUPS, head_tile, dtype=torch.int8, device=cache.device
    )
    mean = torch.empty(*shape, head_tile, dtype=readable_dtype(cache.dtype), device=cache.device)
    numbers = torch.empty(keys.num_kv_heads, KEY_GROUPS + 2, pages, dtype=torch.float32, device=cache.device)
    quantise_keys_kernel[(pages, keys.num_kv_heads)](
        cache,
        chunks.block_table,
        levels,
        mean,
        numbers,
        middle.batch_chunk[batches],
        middle.page_start,
        middle.pages,
        blocks.table_row,
        first_page,
        pages,
        chunks.block_table.stride(0),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        HEAD_SIZE=keys.head_size,
        HEAD_TILE=head_tile,
        PAGE=PAGE_TOKENS,
        BATCH=BATCH_PAGES,
        GROUPS=KEY_GROUPS,
        TOP_LEVEL=top_level(bits),
        MARGIN=bits == 8,
        TINY=TINY,
        ROUNDING=ROUNDING,
        num_warps=4,
    )
    return levels, mean, numbers


@triton.jit
def _local_start(first, last, local_tokens, PAGE: tl.constexpr):
    """First page of the local window of a query block, whose first and last positions these are."""
    return tl.minimum(tl.maximum(last + 1 - local_tokens, 0), first) // PAGE


@triton.jit(
    do_not_specialize=["tokens", "sink_pages", "local_tokens", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table_pointer"],
)
def rows_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    log_tau_pointer,
    levels_pointer,
    number_pointer,
    first_query_pointer,
    last_query_pointer,
    first_token_pointer,
    chunk_pointer,
    table_row_pointer,
    tokens,
    sink_pages,
    local_tokens,
    scale,
    table_row_stride,
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
    first = tl.load(first_query_pointer + i_block)
    last = tl.load(last_query_pointer + i_block)
    context = last + 1
    table_row = tl.load(table_row_pointer + tl.load(chunk_pointer + i_block)).to(tl.int64)
    p_table = block_table_pointer + table_row * table_row_stride
    position = first + tl.arange(0, QUERY_BLOCK)
    live_row = position <= last
    # Rows lie where their tokens lie in the step.
    o_row = tl.load(first_token_pointer + i_block) + tl.arange(0, QUERY_BLOCK)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    p_query = query_pointer + o_row.to(tl.int64)[:, None] * query_row_stride + i_head * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=live_row[:, None] & in_head[None, :], other=0.0)
    b_value = b_query.to(tl.float32)
    b_norm = tl.sqrt(tl.sum(b_value * b_value, axis=1))

    # Scores of the sink and the local window, one page at a time. Where the two overlap, a key is scored once.
    last_page = last // PAGE
    local_start = _local_start(first, last, local_tokens, PAGE)
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
            p_table,
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
    o_out = i_head.to(tl.int64) * tokens + o_row
    tl.store(levels_pointer + o_out[:, None] * HEAD_TILE + o_dim[None, :], b_level.to(tl.int8), mask=live_row[:, None])
    numbers = heads.to(tl.int64) * tokens
    tl.store(number_pointer + o_out, b_least, mask=live_row)
    tl.store(number_pointer + numbers + o_out, b_scale, mask=live_row)
    tl.store(number_pointer + 2 * numbers + o_out, b_norm, mask=live_row)
    tl.store(number_pointer + 3 * numbers + o_out, b_error, mask=live_row)


def quantise_rows(
    chunks: PromptChunks, log_tau: torch.Tensor, scoring: LowBitScoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.thresholds` and `reference.quantise_queries`, of all chunks.

    Returns:
        `levels` for each of the step's queries, int8 ``[heads, step tokens, head_size]`` with channels padded with
        zeros to a power of two; and float32 ``[4, heads, step tokens]``: the results of `reference.thresholds`, then
        `scale`, `norm` and `error`. Anything for queries of no chunk.
    """
    query, keys, blocks = chunks.query, chunks.keys[0], chunks.blocks
    tokens, heads, head_size = query.shape
    assert query.stride(2) == 1
    cache, head_tile = keys.kv_cache, _head_tile(head_size)
    levels = torch.empty(heads, tokens, head_tile, dtype=torch.int8, device=query.device)
    numbers = torch.empty(4, heads, tokens, dtype=torch.float32, device=query.device)
    rows_kernel[(blocks.blocks, heads)](
        query,
        cache,
        chunks.block_table,
        log_tau,
        levels,
        numbers,
        blocks.first_query,
        blocks.last_query,
        blocks.first_token,
        blocks.chunk,
        blocks.table_row,
        tokens,
        scoring.sink_tokens // PAGE_TOKENS,
        scoring.local_tokens,
        chunks.scale,
        chunks.block_table.stride(0),
        query.stride(0),
        query.stride(1),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        GROUP=heads // keys.num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=head_tile,
        QUERY_BLOCK=scoring.query_block_tokens,
        ROW_TILE=ROW_TILE,
        PAGE=PAGE_TOKENS,
        TOP_LEVEL=top_level(scoring.bits),
        MARGIN=scoring.bits == 8,
        TINY=TINY,
        ROUNDING=ROUNDING,
        ROUNDING_NATS=ROUNDING_NATS,
        num_warps=scoring.query_block_tokens // 16,
    )
    return levels, numbers


@triton.jit(
    do_not_specialize=["tokens", "blocks", "first_page", "pages", "key_pages", "sink_pages", "local_tokens"],
    do_not_specialize_on_alignment=["tile_chunk_pointer", "tile_row_pointer"],
)
def scores_kernel(
    query_pointer,
    query_levels_pointer,
    row_number_pointer,
    key_levels_pointer,
    mean_pointer,
    page_number_pointer,
    kept_pointer,
    tile_chunk_pointer,
    tile_row_pointer,
    chunk_start_pointer,
    first_query_pointer,
    last_query_pointer,
    first_token_pointer,
    page_start_pointer,
    pages_pointer,
    tokens,
    blocks,
    first_page,
    pages,
    key_pages,
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
    TILES: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE_TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE_BOUNDS: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCKS * QUERY_BLOCK  # noqa: N806
    # A tile of the tables is `TILES` of those here, of which the last may lie past the chunk's end.
    i_tile = tl.program_id(0) // TILES
    i_chunk = tl.load(tile_chunk_pointer + i_tile)
    first_row = tl.load(tile_row_pointer + i_tile) + tl.program_id(0) % TILES * ROWS
    i_segment = tl.program_id(1) * SEGMENT
    i_head = tl.program_id(2)
    i_kv_head = (i_head // GROUP).to(tl.int64)
    end_block = tl.load(chunk_start_pointer + i_chunk + 1)
    i_first_block = tl.load(chunk_start_pointer + i_chunk) + first_row // QUERY_BLOCK
    o_block = i_first_block + tl.arange(0, BLOCKS)
    live_block = o_block < end_block
    # The last query block ends with the context.
    last_key = tl.load(last_query_pointer + end_block - 1)
    chunk_pages = tl.load(pages_pointer + i_chunk)
    b_first = tl.load(first_query_pointer + o_block, mask=live_block, other=0)
    b_last = tl.load(last_query_pointer + o_block, mask=live_block, other=0)
    b_local_start = _local_start(b_first, b_last, local_tokens, PAGE)
    # No page of a chunk without quantised ones is scored.
    middle_end = tl.minimum(tl.max(tl.where(live_block, b_local_start, 0), axis=0), chunk_pages)

    i_row_block = tl.minimum(i_first_block, end_block - 1)
    o_token = tl.load(first_token_pointer + i_row_block) + tl.arange(0, ROWS)
    # Past the chunk's rows there is nothing to do.
    last_position = tl.where(i_first_block < end_block, last_key, -1)
    live_row = tl.load(first_query_pointer + i_row_block) + tl.arange(0, ROWS) <= last_position
    o_dim = tl.arange(0, HEAD_TILE)
    p_query = query_pointer + o_token.to(tl.int64)[:, None] * query_row_stride + i_head * query_head_stride
    b_query = tl.load(p_query + o_dim[None, :], mask=live_row[:, None] & (o_dim < HEAD_SIZE)[None, :], other=0.0)
    o_number = i_head.to(tl.int64) * tokens + o_token
    b_level = tl.load(
        query_levels_pointer + o_number[:, None] * HEAD_TILE + o_dim[None, :], mask=live_row[:, None], other=0
    )
    numbers = tl.num_programs(2).to(tl.int64) * tokens
    b_least = tl.load(row_number_pointer + o_number, mask=live_row, other=float("inf"))
    b_query_scale = tl.load(row_number_pointer + numbers + o_number, mask=live_row, other=0.0) * scale
    b_norm = tl.load(row_number_pointer + 2 * numbers + o_number, mask=live_row, other=0.0) * scale
    b_query_error = tl.load(row_number_pointer + 3 * numbers + o_number, mask=live_row, other=0.0) * scale

    stop = tl.minimum(i_segment + SEGMENT, (last_position + PAGE) // PAGE)
    i_first_stored = i_kv_head * pages + tl.load(page_start_pointer + i_chunk) - first_page
    for start in range(i_segment, stop, PAGE_TILE):
        o_page = start + tl.arange(0, PAGE_TILE)
        near = (o_page < sink_pages)[None, :] | (o_page[None, :] >= b_local_start[:, None])
        b_kept = near
        if start < middle_end:
            # Pages past the quantised ones are kept anyway, so what is read instead of them does not matter.
            o_stored = tl.minimum(o_page, chunk_pages - 1)
            o_read = i_first_stored + o_stored
            b_mean = tl.load(mean_pointer + o_read[:, None] * HEAD_TILE + o_dim[None, :])
            # Scores of the means, less the threshold of each row.
            b_above = tl.dot(b_query, tl.trans(b_mean), input_precision="ieee") * scale - b_least[:, None]
            p_number = page_number_pointer + i_first_stored + i_kv_head * (GROUPS + 1) * pages + o_stored
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
        o_kept = (i_head * blocks + o_block).to(tl.int64)[:, None] * key_pages + o_page[None, :]
        tl.store(kept_pointer + o_kept, b_kept.to(tl.uint8), mask=live_block[:, None] & (o_page < key_pages)[None, :])


def kept_maps(chunks: PromptChunks, middle: MiddlePages, log_tau: torch.Tensor, scoring: LowBitScoring) -> torch.Tensor:
    """Equal to `reference.kept_maps` up to rounding, and anything past a context; arguments as in the public function.

    At least one page is quantised.
    """
    query, keys, blocks = chunks.query, chunks.keys[0], chunks.blocks
    tokens, heads, head_size = query.shape
    key_pages = triton.cdiv(blocks.longest_seq_len, PAGE_TOKENS)
    query_levels, row_numbers = quantise_rows(chunks, log_tau, scoring)
    kept = torch.empty(heads, blocks.blocks, key_pages, dtype=torch.bool, device=query.device)
    # Of wide heads several tiles of keys at once would need 128 KiB.
    stages = {"num_stages": 1} if head_size > 128 and shared_memory_kib() < 128 else {}
    for part in middle.parts(keys.num_kv_heads):
        key_levels, mean, page_numbers = quantise_keys(chunks, middle, part, scoring.bits)
        tiles = slice(middle.tile_starts[part.start], middle.tile_starts[part.stop])
        grid = (tiles.stop - tiles.start) * (TILE_ROWS // SCORED_ROWS), triton.cdiv(key_pages, SEGMENT_PAGES), heads
        scores_kernel[grid](
            query,
            query_levels,
            row_numbers,
            key_levels,
            mean,
            page_numbers,
            kept.view(torch.uint8),
            middle.tile_chunk[tiles],
            middle.tile_row[tiles],
            blocks.chunk_start,
            blocks.first_query,
            blocks.last_query,
            blocks.first_token,
            middle.page_start,
            middle.pages,
            tokens,
            blocks.blocks,
            middle.starts[part.start],
            page_numbers.shape[2],
            key_pages,
            scoring.sink_tokens // PAGE_TOKENS,
            scoring.local_tokens,
            chunks.scale,
            query.stride(0),
            query.stride(1),
            GROUP=heads // keys.num_kv_heads,
            HEAD_SIZE=head_size,
            HEAD_TILE=_head_tile(head_size),
            QUERY_BLOCK=scoring.query_block_tokens,
            BLOCKS=SCORED_ROWS // scoring.query_block_tokens,
            TILES=TILE_ROWS // SCORED_ROWS,
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
