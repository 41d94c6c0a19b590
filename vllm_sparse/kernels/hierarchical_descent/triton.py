"""HiP's selection in Triton: each stage launches one kernel that scores key blocks and one that keeps the best.

At 128K tokens, with a prompt chunk of 8192 tokens, 8 KV heads of 128 channels in bfloat16 and the default knobs, the
three stages of a (KV head, query block) read about 8 000, 6 100 and 4 100 single keys. Together these are 2.4 GB, which
come from the L2 cache because many query blocks read the same keys, and 0.3 TFLOP. The key blocks of a tile are the
rows of the matrix product, so that the maximum over queries stays in a warp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import (
    chosen_entries,
    ordered_scores,
    product_tile,
    readable,
    row_threshold,
    threshold_tile,
)
from vllm_sparse.kernels.hierarchical_descent.ranges import (
    SCRATCH_BYTES,
    SearchRanges,
    entries_of_search,
    search_bytes,
)
from vllm_sparse.kernels.hierarchical_descent.reference import (
    LEAF_TOKENS,
    DescentArguments,
    candidates,
    search_start,
)
from vllm_sparse.step.chunks import PromptBlocks, PromptChunks

AVERAGE_TILE, KEY_BLOCK_TILE, SELECT_TILE = 1024, 32, 1024
# Numbers (rows times channels) of queries that stay in shared memory through all descents of a program, and of a tile
# of queries that are too many to stay.
RESIDENT_NUMBERS, PASSING_NUMBERS = 512 * 128, 64 * 128
# Programs of a launch: several for each that the GPU runs at once. With fewer query blocks, more programs share the key
# blocks of one query block.
LEAST_PROGRAMS = 4096


# Lengths change with every prompt chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["width"])
def averaged_queries_kernel(
    query_pointer,
    averaged_pointer,
    first_query_pointer,
    last_query_pointer,
    first_token_pointer,
    width,
    query_row_stride,
    BLOCK_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_row = tl.program_id(0)
    i_block = i_row // BLOCK_ROWS
    first = i_row % BLOCK_ROWS * STRIDE
    tokens = tl.load(last_query_pointer + i_block) + 1 - tl.load(first_query_pointer + i_block)
    # Not positive behind the end of a short query block, whose rows are never read.
    count = tl.minimum(tokens - first, STRIDE)
    o_number = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = o_number < tl.where(count > 0, width, 0)
    i_token = (tl.load(first_token_pointer + i_block) + first).to(tl.int64)
    b_sum = tl.zeros([TILE], tl.float32)
    for step in range(count):
        p_query = query_pointer + (i_token + step) * query_row_stride
        b_sum += tl.load(p_query + o_number, mask=in_row, other=0.0).to(tl.float32)
    p_averaged = averaged_pointer + i_row.to(tl.int64) * width
    tl.store(p_averaged + o_number, b_sum / tl.maximum(count, 1), mask=in_row)


def averaged_queries(query: torch.Tensor, blocks: PromptBlocks, stride: int) -> torch.Tensor:
    """Means as of `reference.averaged_queries` of each query block.

    Args:
        query: ``[step tokens, query_heads, head_size]``, the query heads of a token adjacent in memory.
        blocks: the query blocks.
        stride: number of queries of a mean; divides the query block.

    Returns:
        ``[blocks * query_block_tokens / stride, query_heads, head_size]`` in the queries' dtype. Rows behind the end of
        a short query block are not written.
    """
    _, heads, head_size = query.shape
    block_rows, width = blocks.query_block_tokens // stride, heads * head_size
    rows = blocks.blocks * block_rows
    averaged = torch.empty(rows, heads, head_size, dtype=query.dtype, device=query.device)
    averaged_queries_kernel[(rows, triton.cdiv(width, AVERAGE_TILE))](
        query,
        averaged,
        blocks.first_query,
        blocks.last_query,
        blocks.first_token,
        width,
        query.stride(0),
        BLOCK_ROWS=block_rows,
        STRIDE=stride,
        TILE=AVERAGE_TILE,
        num_warps=4,
    )
    return averaged


@triton.jit
def live_key_blocks(p_parent, begin, end, parent_tokens, key_block_tokens, first_stage):
    """How many key blocks a stage chooses from in one search. Only the last one may be shorter than the others."""
    if first_stage:
        live = tl.cdiv(tl.maximum(end - begin, 0), key_block_tokens)
    else:
        parents = tl.load(p_parent)
        last_parent = tl.load(p_parent + parents, mask=parents > 0, other=0)
        in_last = tl.cdiv(tl.minimum(end - last_parent, parent_tokens), key_block_tokens)
        live = tl.where(parents > 0, (parents - 1) * (parent_tokens // key_block_tokens) + in_last, 0)
    return live


@triton.jit
def key_block_start(p_parent, o_key_block, live, begin, parent_tokens, key_block_tokens, first_stage):
    """First tokens of the key blocks that a stage chooses from, ascending."""
    if first_stage:
        start = begin + o_key_block * key_block_tokens
    else:
        parts = parent_tokens // key_block_tokens
        start = tl.load(p_parent + 1 + o_key_block // parts, mask=o_key_block < live, other=0)
        start += o_key_block % parts * key_block_tokens
    return start


@triton.jit
def descent_bounds(start, end, exists, key_block_tokens, TILE: tl.constexpr):
    """Where descents begin: first token, token after the last, and best score so far, ``[2, TILE]`` each.

    Row 0 is for the left half of a key block and row 1 for its right half, so that the keys of both are fetched
    together. Key blocks that do not exist descend to the request's first key, and their scores are not stored.
    """
    low = tl.broadcast_to(tl.where(exists, start, 0)[None, :], [2, TILE])
    high = tl.broadcast_to(tl.where(exists, tl.minimum(start + key_block_tokens, end), 1)[None, :], [2, TILE])
    return low, high, tl.full([2, TILE], float("-inf"), tl.float32)


@triton.jit
def midpoint_keys(
    p_head,
    p_table,
    low,
    high,
    is_left,
    cache_block_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Where the two halves meet, ``[2, TILE]``, and pointers to the midpoint keys of both halves, ``[2 * TILE]``.

    `p_head` points to a KV head in the cache and `p_table` to the request's block table; `is_left` is true in row 0.
    """
    middle = (low + high + 1) // 2
    # Where one key is left the right half is empty, and that key stands for it.
    right = tl.minimum((middle + high) // 2, high - 1)
    position = tl.reshape(tl.where(is_left, (low + middle) // 2, right), [2 * TILE])
    physical = tl.load(p_table + position // CACHE_BLOCK).to(tl.int64)
    return middle, p_head + physical * cache_block_stride + position % CACHE_BLOCK * cache_token_stride


@triton.jit
def enter_better_half(b_score, b_best, low, middle, high, is_left, TILE: tl.constexpr):
    """Go into the half whose midpoint key scores more, into the left one if they are equal.

    Args:
        b_score: float32 ``[2 * TILE]`` scores of the keys that `midpoint_keys` points to.
        b_best: float32 ``[2, TILE]`` largest score so far.
        low, middle, high: int32 ``[2, TILE]`` bounds of the two halves.
        is_left: bool ``[2, 1]``, true in row 0.

    Returns:
        `low`, `high` and `b_best` of the next step.
    """
    b_half = tl.reshape(b_score, [2, TILE])
    b_best = tl.maximum(b_best, b_half)
    b_left = tl.max(tl.where(is_left, b_half, float("-inf")), axis=0)
    b_right = tl.max(tl.where(is_left, float("-inf"), b_half), axis=0)
    goes_left = (b_left >= b_right)[None, :]
    return tl.where(goes_left, low, middle), tl.where(goes_left, middle, high), b_best


@triton.jit
def store_best_key_blocks(
    p_score,
    p_parent,
    p_kept,
    p_mask,
    begin,
    end,
    live,
    parent_tokens,
    key_block_tokens,
    kept_key_blocks,
    first_stage,
    LAST: tl.constexpr,
    LEAF: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store what a stage keeps in one search: the number of key blocks and their first tokens, or if `LAST` leaves."""
    # Where all key blocks are kept there are no scores: no key block competes, and all are equal.
    competing = tl.where(live > kept_key_blocks, live, 0)
    count = tl.minimum(live, kept_key_blocks)

    least, above = row_threshold(p_score, 0, competing, count, False, ROW_TILE, TILE)
    # Of the key blocks whose score equals the threshold, the lower ones win.
    equal_left = count - above
    written = 0
    for first in range(0, live, TILE):
        o_key_block = first + tl.arange(0, TILE)
        b_key = ordered_scores(p_score, o_key_block, o_key_block < competing)
        b_equal = ((b_key == least) & (o_key_block < live)).to(tl.int32)
        b_chosen, equal_left = chosen_entries(b_key, b_equal, least, equal_left)
        start = key_block_start(p_parent, o_key_block, live, begin, parent_tokens, key_block_tokens, first_stage)
        if LAST:
            for offset in range(0, key_block_tokens, LEAF):
                tl.store(p_mask + (start + offset) // LEAF, 1, mask=b_chosen & (start + offset < end))
        else:
            b_slot = written + tl.cumsum(b_chosen.to(tl.int32), axis=0)
            tl.store(p_kept + b_slot, start, mask=b_chosen)
            written += tl.sum(b_chosen.to(tl.int32))
    if not LAST:
        tl.store(p_kept, written)


@triton.jit
def _queries(
    query_pointer,
    query_row_stride,
    first_row,
    rows,
    i_part,
    row_start,
    o_dim,
    in_head,
    MEMBERS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Queries of a query block and of the query heads of one KV head (`i_part`): ``[channels, ROW_TILE]``."""
    o_row = row_start + tl.arange(0, ROW_TILE)
    # Rows past the query block's `rows` repeat the last one, which changes no maximum.
    row = first_row + tl.minimum(o_row // MEMBERS, rows - 1)
    head = i_part * MEMBERS + o_row % MEMBERS
    p_query = query_pointer + row.to(tl.int64) * query_row_stride + head * HEAD_SIZE
    return tl.trans(tl.load(p_query[:, None] + o_dim[None, :], mask=in_head[None, :], other=0.0))


# A request's blocks begin at any row of vLLM's block table.
@triton.jit(
    do_not_specialize=[
        "first_block",
        "begin",
        "parent_tokens",
        "key_block_tokens",
        "kept_key_blocks",
        "steps",
        "list_width",
        "score_width",
        "table_row_stride",
    ],
    do_not_specialize_on_alignment=["parent_pointer", "block_table_pointer"],
)
def key_block_scores_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    parent_pointer,
    score_pointer,
    first_query_pointer,
    last_query_pointer,
    end_pointer,
    first_token_pointer,
    chunk_pointer,
    table_row_pointer,
    first_block,
    begin,
    parent_tokens,
    key_block_tokens,
    kept_key_blocks,
    steps,
    list_width,
    score_width,
    table_row_stride,
    query_row_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    FIRST: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    LISTS_PER_KV_HEAD: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    resident: tl.constexpr = PARTS == 1 and BLOCK_ROWS * MEMBERS <= ROW_TILE
    i_block = first_block + tl.program_id(0)
    i_head = tl.program_id(2)
    i_search = (i_head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    p_parent = parent_pointer + i_search * list_width
    end = tl.load(end_pointer + i_block)
    live = live_key_blocks(p_parent, begin, end, parent_tokens, key_block_tokens, FIRST)
    # Where all key blocks are kept, no score is read.
    live = tl.where(live > kept_key_blocks, live, 0)
    p_table = block_table_pointer
    p_table += tl.load(table_row_pointer + tl.load(chunk_pointer + i_block)).to(tl.int64) * table_row_stride
    tokens = tl.load(last_query_pointer + i_block) + 1 - tl.load(first_query_pointer + i_block)
    rows = tl.cdiv(tokens, QUERY_BLOCK // BLOCK_ROWS)
    # Queries lie where the step has them, their means block after block.
    first_row = tl.load(first_token_pointer + i_block) if BLOCK_ROWS == QUERY_BLOCK else i_block * BLOCK_ROWS
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    is_left = tl.arange(0, 2)[:, None] == 0
    if resident:
        b_query = _queries(
            query_pointer,
            query_row_stride,
            first_row,
            rows,
            i_head,
            0,
            o_dim,
            in_head,
            MEMBERS,
            HEAD_SIZE,
            ROW_TILE,
        )
    for first in range(tl.program_id(1) * TILE, live, tl.num_programs(1) * TILE):
        o_key_block = first + tl.arange(0, TILE)
        exists = o_key_block < live
        start = key_block_start(p_parent, o_key_block, live, begin, parent_tokens, key_block_tokens, FIRST)
        low, high, b_best = descent_bounds(start, end, exists, key_block_tokens, TILE)
        for _ in range(steps):
            middle, p_key = midpoint_keys(
                cache_pointer,
                p_table,
                low,
                high,
                is_left,
                cache_block_stride,
                cache_token_stride,
                CACHE_BLOCK,
                TILE,
            )
            b_score = tl.full([2 * TILE], float("-inf"), tl.float32)
            for i_member in range(PARTS):
                i_part = i_head * PARTS + i_member
                p_part = p_key + i_part // LISTS_PER_KV_HEAD * cache_head_stride
                b_key = readable(tl.load(p_part[:, None] + o_dim[None, :], mask=in_head[None, :], other=0.0))
                for row_start in range(0, BLOCK_ROWS * MEMBERS, ROW_TILE):
                    if not resident:
                        b_query = _queries(
                            query_pointer,
                            query_row_stride,
                            first_row,
                            rows,
                            i_part,
                            row_start,
                            o_dim,
                            in_head,
                            MEMBERS,
                            HEAD_SIZE,
                            ROW_TILE,
                        )
                    # "ieee", because Triton would round float32 inputs to TF32.
                    b_product = tl.dot(b_key, b_query, input_precision="ieee")
                    b_score = tl.maximum(b_score, tl.max(b_product, axis=1))
            low, high, b_best = enter_better_half(b_score, b_best, low, middle, high, is_left, TILE)
        tl.store(score_pointer + i_search * score_width + o_key_block, tl.max(b_best, axis=0), mask=exists)


@triton.jit(
    do_not_specialize=[
        "first_block",
        "blocks",
        "begin",
        "parent_tokens",
        "key_block_tokens",
        "kept_key_blocks",
        "list_width",
        "score_width",
        "leaves",
    ],
    do_not_specialize_on_alignment=["parent_pointer", "kept_pointer"],
)
def best_key_blocks_kernel(
    score_pointer,
    parent_pointer,
    kept_pointer,
    mask_pointer,
    last_query_pointer,
    end_pointer,
    first_block,
    blocks,
    begin,
    parent_tokens,
    key_block_tokens,
    kept_key_blocks,
    list_width,
    score_width,
    leaves,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    LEAF: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_block = first_block + tl.program_id(0)
    i_search = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    p_parent = parent_pointer + i_search * list_width
    p_kept = kept_pointer + i_search * list_width
    p_mask = mask_pointer + (tl.program_id(1) * blocks + i_block).to(tl.int64) * leaves
    p_score = score_pointer + i_search * score_width
    last, end = tl.load(last_query_pointer + i_block), tl.load(end_pointer + i_block)
    live = live_key_blocks(p_parent, begin, end, parent_tokens, key_block_tokens, FIRST)
    store_best_key_blocks(
        p_score,
        p_parent,
        p_kept,
        p_mask,
        begin,
        end,
        live,
        parent_tokens,
        key_block_tokens,
        kept_key_blocks,
        FIRST,
        LAST,
        LEAF,
        ROW_TILE,
        TILE,
    )
    if LAST:
        # Mark the sink, and all from the window's start to the query block's last query.
        for first in range(0, tl.minimum(begin, last + 1), TILE * LEAF):
            o_leaf = first // LEAF + tl.arange(0, TILE)
            tl.store(p_mask + o_leaf, 1, mask=o_leaf * LEAF < tl.minimum(begin, last + 1))
        for first in range(end // LEAF, last // LEAF + 1, TILE):
            o_leaf = first + tl.arange(0, TILE)
            tl.store(p_mask + o_leaf, 1, mask=o_leaf <= last // LEAF)


def hierarchical_descents(
    chunks: PromptChunks, ranges: SearchRanges, arguments: DescentArguments, heads: int
) -> torch.Tensor:
    """Equal to `reference.hierarchical_descents` but for rounding of scores; arguments as in the public function."""
    query, cache, blocks, pruning = chunks.query, chunks.keys[0].kv_cache, chunks.blocks, ranges.stages
    _, query_heads, head_size = query.shape
    kv_heads = cache.shape[1]
    if not pruning:
        leaf_start = torch.arange(0, blocks.longest_seq_len, LEAF_TOKENS, device=query.device)
        return (leaf_start <= blocks.last_query.unsqueeze(1)).expand(heads, -1, -1)

    if query.stride(2) != 1 or query.stride(1) != head_size:
        query = query.contiguous()
    strides = {stage.query_stride for stage in pruning}
    queries = {stride: query if stride == 1 else averaged_queries(query, blocks, stride) for stride in strides}
    widths = candidates(pruning, ranges.range_tokens)
    score_width, list_width = entries_of_search(pruning, ranges.range_tokens)
    of_a_block = heads * search_bytes(score_width, list_width)
    at_a_time = min(max(SCRATCH_BYTES // of_a_block, 1), blocks.blocks)
    scores = torch.empty(heads * at_a_time, score_width, dtype=torch.float32, device=query.device)
    # For each search: the number of kept key blocks, then their first tokens, of a stage and of the one before it. The
    # second half may begin at any address, so the kernels do not specialise on its alignment: they would be compiled
    # again while serving.
    kept = torch.empty(2, heads * at_a_time, list_width, dtype=torch.int32, device=query.device)
    leaves = triton.cdiv(blocks.longest_seq_len, LEAF_TOKENS)
    mask = torch.zeros(heads, blocks.blocks, leaves, dtype=torch.bool, device=query.device)

    # A list that reads several KV heads is searched one KV head at a time.
    parts = max(kv_heads // heads, 1)
    members = query_heads // (heads * parts)
    head_tile = product_tile(head_size)
    begin = search_start(arguments.sink_tokens)
    for first_block in range(0, blocks.blocks, at_a_time):
        searched = min(at_a_time, blocks.blocks - first_block)
        parent_tokens = 0
        for index, (stage, width) in enumerate(zip(pruning, widths, strict=True)):
            stage_query = queries[stage.query_stride]
            block_rows = blocks.query_block_tokens // stage.query_stride
            row_tile = product_tile(block_rows * members)
            if parts > 1 or row_tile * head_tile > RESIDENT_NUMBERS:
                row_tile = min(row_tile, PASSING_NUMBERS // head_tile)
            parent = kept[(index + 1) % 2]
            programs = min(triton.cdiv(LEAST_PROGRAMS, heads * searched), triton.cdiv(width, KEY_BLOCK_TILE))
            key_block_scores_kernel[(searched, programs, heads)](
                stage_query,
                cache,
                chunks.block_table,
                parent,
                scores,
                blocks.first_query,
                blocks.last_query,
                ranges.end,
                blocks.first_token,
                blocks.chunk,
                blocks.table_row,
                first_block,
                begin,
                parent_tokens,
                stage.key_block_tokens,
                stage.kept_key_blocks,
                stage.key_block_tokens.bit_length() - 1,
                list_width,
                score_width,
                chunks.block_table.stride(0),
                stage_query.stride(0),
                cache.stride(0),
                cache.stride(1),
                cache.stride(2),
                FIRST=index == 0,
                QUERY_BLOCK=blocks.query_block_tokens,
                BLOCK_ROWS=block_rows,
                MEMBERS=members,
                PARTS=parts,
                LISTS_PER_KV_HEAD=max(heads // kv_heads, 1),
                CACHE_BLOCK=cache.shape[2],
                HEAD_SIZE=head_size,
                HEAD_TILE=head_tile,
                ROW_TILE=row_tile,
                TILE=KEY_BLOCK_TILE,
                num_warps=4 if row_tile <= 256 and head_tile <= 128 else 8,  # as registers allow
                num_stages=1,
            )
            entries, num_warps = threshold_tile(width)
            best_key_blocks_kernel[(searched, heads)](
                scores,
                parent,
                kept[index % 2],
                mask.view(torch.uint8),
                blocks.last_query,
                ranges.end,
                first_block,
                blocks.blocks,
                begin,
                parent_tokens,
                stage.key_block_tokens,
                stage.kept_key_blocks,
                list_width,
                score_width,
                leaves,
                FIRST=index == 0,
                LAST=index == len(pruning) - 1,
                LEAF=LEAF_TOKENS,
                ROW_TILE=entries,
                TILE=SELECT_TILE,
                num_warps=num_warps,
            )
            parent_tokens = stage.key_block_tokens
    return mask
