"""Attention of sampled queries to all pages in Triton, in two launches.

A row is a sampled query of a head. A program of the first kernel multiplies rows of a few query blocks and query heads
of a KV head with a segment of the keys. A product takes few instructions, so that reading keys through the L2 is what
takes the time: an exponential for each group of keys, no logarithm, and no mask but in the last tiles. Products are
taken once: the mass of each row and page, less the row's largest product by then, is kept until the row's normaliser is
known. The second kernel knows it, from what each segment found, and sums the rows of a query block and head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.candidate_mass.reference import KEY_GROUPS, SAMPLED_QUERIES, SCRATCH_BYTES
from vllm_sparse.kernels.common.triton import largest_of_groups, load_key_block, product_tile, shared_memory_kib
from vllm_sparse.kernels.sampled_mass.reference import KEY_TILE, MOST_ROWS, kept_bytes, programs
from vllm_sparse.keys import PlainKeys
from vllm_sparse.step.chunks import PromptChunks, one_chunk

# The fastest on an H200 (loadtest/RESULTS.md): `MOST_ROWS` rows, and tiles in flight. Both are less where shared memory
# and registers have no room for them.
WARPS, STAGES = 4, 3
FEW_ROWS, FEW_STAGES = 64, 2
# Keys of a program: so few that programs are many and alike, so many that fetching its queries costs nothing.
SEGMENT = 16384
# Pages whose kept masses a program of the second kernel reads at once, and how often it does.
PAGE_TILE, PAGE_TILES = 64, 4
LOG2_E = 1.4426950408889634


@triton.jit
def _rows(
    first_query_pointer,
    last_query_pointer,
    first_block,
    blocks,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Of each row of a program: its query block, its head of the KV head, and its block's first and next query."""
    o_row = tl.arange(0, BLOCKS * HEADS * SAMPLES)
    o_block = first_block + o_row // (HEADS * SAMPLES)
    o_in_group = tl.program_id(2) * HEADS + o_row // SAMPLES % HEADS
    in_step = o_block < blocks
    b_first = tl.load(first_query_pointer + o_block, mask=in_step, other=0)
    b_stop = tl.load(last_query_pointer + o_block, mask=in_step, other=-1) + 1
    return o_block, o_in_group, b_first, b_stop


# Lengths change with every prompt chunk, and a request's blocks begin at any row of vLLM's block table; specialising on
# them would compile in the middle of serving.
@triton.jit(
    do_not_specialize=["first_group", "segments", "kv_heads", "blocks", "pages", "table_row_stride"],
    do_not_specialize_on_alignment=["block_table_pointer"],
)
def segment_masses_kernel(
    query_pointer,
    cache_pointer,
    block_table_pointer,
    kept_mass_pointer,
    kept_most_pointer,
    partial_pointer,
    first_query_pointer,
    last_query_pointer,
    first_token_pointer,
    chunk_pointer,
    table_row_pointer,
    first_group,
    segments,
    kv_heads,
    blocks,
    pages,
    scale_log2,
    table_row_stride,
    query_row_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    SAMPLES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Masses of a segment's pages less the largest product by then; the segment's largest product and sum."""
    rows: tl.constexpr = BLOCKS * HEADS * SAMPLES
    i_segment = tl.program_id(0) % segments
    i_group = tl.program_id(0) // segments
    i_kv_head = tl.program_id(1)
    first_block = (first_group + i_group) * BLOCKS
    o_block, o_in_group, b_first, b_stop = _rows(
        first_query_pointer, last_query_pointer, first_block, blocks, BLOCKS, HEADS, SAMPLES
    )
    begin = i_segment * SEGMENT
    if begin < tl.max(b_stop):
        o_row = tl.arange(0, BLOCKS * HEADS * SAMPLES)
        in_step = o_block < blocks
        b_chunk = tl.load(chunk_pointer + o_block, mask=in_step, other=-1)
        o_query = (2 * (o_row % SAMPLES) + 1) * (b_stop - b_first) // (2 * SAMPLES)
        row_position = b_first + o_query
        o_dim = tl.arange(0, HEAD_TILE)
        in_head = o_dim < HEAD_SIZE
        b_token = tl.load(first_token_pointer + o_block, mask=in_step, other=0) + o_query
        p_query = query_pointer + b_token.to(tl.int64) * query_row_stride
        p_query += (i_kv_head * GROUP + o_in_group) * query_head_stride
        live_row = in_step & (o_in_group < GROUP)
        b_query = tl.load(p_query[:, None] + o_dim[None, :], mask=live_row[:, None] & in_head[None, :], other=0.0)
        o_kept = tl.arange(0, TILE // PAGE)[None, :] * rows + o_row[:, None]

        i_program = ((i_group * kv_heads + i_kv_head) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
        p_kept_mass = kept_mass_pointer + i_program * pages * rows
        p_kept_most = kept_most_pointer + i_program * tl.cdiv(pages, TILE // PAGE) * rows
        p_partial = partial_pointer + (i_program * segments + i_segment) * 2 * rows + o_row
        # Nearly always one: the rows of the others are idle, and keep nothing.
        first_chunk = tl.load(chunk_pointer + first_block)
        last_chunk = tl.load(chunk_pointer + tl.minimum(first_block + BLOCKS, blocks) - 1)
        for i_chunk in range(first_chunk, last_chunk + 1):
            in_chunk = b_chunk == i_chunk
            p_table = block_table_pointer + tl.load(table_row_pointer + i_chunk).to(tl.int64) * table_row_stride
            # Later keys are in no row's past.
            context = tl.max(tl.where(in_chunk, b_stop, 0))
            stop = tl.minimum(context, begin + SEGMENT)
            # Tiles before this one lie in the past of all rows; only those from it on are masked.
            diagonal = (tl.min(tl.where(in_chunk, b_first, context)) + 1) // TILE * TILE
            diagonal = tl.minimum(tl.maximum(diagonal, begin), tl.maximum(stop, begin))
            b_most = tl.full([rows], float("-inf"), tl.float32)
            b_sum = tl.zeros([rows, TILE // PAGE], tl.float32)
            for masked in tl.static_range(2):
                for first_key in range(diagonal if masked else begin, stop if masked else diagonal, TILE):
                    # Masks would take a tenth of the instructions.
                    b_key = load_key_block(
                        cache_pointer,
                        p_table,
                        first_key,
                        stop,
                        i_kv_head,
                        o_dim,
                        in_head,
                        cache_block_stride,
                        cache_head_stride,
                        cache_token_stride,
                        CACHE_BLOCK,
                        TILE,
                        WHOLE=not masked and HEAD_SIZE == HEAD_TILE,
                    )
                    b_product = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
                    if masked:
                        o_key = first_key + tl.arange(0, TILE)
                        b_product = tl.where(o_key[None, :] <= row_position[:, None], b_product, float("-inf"))
                    b_largest = largest_of_groups(b_product, PAGE, GROUPS)
                    b_more = tl.maximum(b_most, tl.max(tl.max(b_largest, axis=2), axis=1) * scale_log2)
                    b_less = b_more
                    if masked:
                        # The segment may hold no key of a row's past so far.
                        b_less = tl.where(b_more > float("-inf"), b_more, 0.0)
                    b_page = tl.sum(tl.exp2(b_largest * scale_log2 - b_less[:, None, None]), axis=2)
                    b_sum = b_sum * tl.exp2(b_most - b_less)[:, None] + b_page
                    b_most = b_more
                    tl.store(p_kept_most + first_key // TILE * rows + o_row, b_more, mask=in_chunk)
                    p_kept = p_kept_mass + first_key // PAGE * rows + o_kept
                    o_page = first_key + tl.arange(0, TILE // PAGE) * PAGE
                    kept = in_chunk[:, None] & (o_page < stop)[None, :]
                    tl.store(p_kept, b_page.to(p_kept_mass.dtype.element_ty), mask=kept)
            tl.store(p_partial, b_most, mask=in_chunk & (begin < b_stop))
            tl.store(p_partial + rows, tl.sum(b_sum, axis=1), mask=in_chunk & (begin < b_stop))


@triton.jit(do_not_specialize=["first_group", "segments", "kv_heads", "blocks", "pages"])
def page_masses_kernel(
    mass_pointer,
    kept_mass_pointer,
    kept_most_pointer,
    partial_pointer,
    first_query_pointer,
    last_query_pointer,
    first_group,
    segments,
    kv_heads,
    blocks,
    pages,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    SAMPLES: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE_TILE: tl.constexpr,
    PAGE_TILES: tl.constexpr,
):
    """Masses of some pages, of each query block and head of a program of the first kernel."""
    rows: tl.constexpr = BLOCKS * HEADS * SAMPLES
    parts = tl.cdiv(pages, PAGE_TILE * PAGE_TILES)
    i_group = tl.program_id(0) // parts
    first_page = tl.program_id(0) % parts * (PAGE_TILE * PAGE_TILES)
    i_kv_head = tl.program_id(1)
    first_block = (first_group + i_group) * BLOCKS
    _, _, _, b_stop = _rows(first_query_pointer, last_query_pointer, first_block, blocks, BLOCKS, HEADS, SAMPLES)
    o_row = tl.arange(0, BLOCKS * HEADS * SAMPLES)
    i_program = ((i_group * kv_heads + i_kv_head) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
    p_kept_mass = kept_mass_pointer + i_program * pages * rows
    p_kept_most = kept_most_pointer + i_program * tl.cdiv(pages, TILE // PAGE) * rows
    p_partial = partial_pointer + i_program * segments * 2 * rows + o_row

    # The first segment holds key 0, of every row's past. Rows that do not exist have a sum of 0 and are not stored.
    b_most = tl.full([rows], float("-inf"), tl.float32)
    b_sum = tl.zeros([rows], tl.float32)
    for i_segment in range(tl.cdiv(tl.max(b_stop), SEGMENT)):
        found = i_segment * SEGMENT < b_stop
        b_part = tl.load(p_partial + i_segment * 2 * rows, mask=found, other=float("-inf"))
        b_part_sum = tl.load(p_partial + (i_segment * 2 + 1) * rows, mask=found, other=0.0)
        b_more = tl.maximum(b_most, b_part)
        b_less = tl.where(b_more > float("-inf"), b_more, 0.0)
        b_sum = b_sum * tl.exp2(b_most - b_less) + b_part_sum * tl.exp2(b_part - b_less)
        b_most = b_more
    b_normaliser = tl.where(b_stop > 0, b_most + tl.log2(b_sum), 0.0)

    o_sum = tl.arange(0, BLOCKS * HEADS)
    o_block = first_block + o_sum // HEADS
    o_head = tl.program_id(2) * HEADS + o_sum % HEADS
    live = (o_block < blocks) & (o_head < GROUP)
    p_mass = mass_pointer + ((i_kv_head * GROUP + o_head) * blocks + o_block).to(tl.int64) * pages
    for tile in range(PAGE_TILES):
        o_page = first_page + tile * PAGE_TILE + tl.arange(0, PAGE_TILE)
        read = (o_page * PAGE)[None, :] < b_stop[:, None]
        b_kept = tl.load(p_kept_mass + o_page[None, :] * rows + o_row[:, None], mask=read, other=0.0)
        p_most = p_kept_most + (o_page // (TILE // PAGE))[None, :] * rows + o_row[:, None]
        b_then = tl.load(p_most, mask=read, other=float("-inf"))
        b_weight = b_kept.to(tl.float32) * tl.exp2(b_then - b_normaliser[:, None])
        b_mass = tl.sum(tl.reshape(b_weight, [BLOCKS * HEADS, SAMPLES, PAGE_TILE]), axis=1)
        tl.store(p_mass[:, None] + o_page[None, :], b_mass, mask=live[:, None] & (o_page < pages)[None, :])


def chunk_sampled_mass(chunks: PromptChunks, page_tokens: int) -> torch.Tensor:
    """Equal to `reference.chunk_sampled_mass` but for rounding; arguments as there, float32."""
    query, cache, blocks = chunks.query, chunks.keys[0].kv_cache, chunks.blocks
    heads, head_size = query.shape[1:]
    kv_heads = cache.shape[1]
    pages = triton.cdiv(blocks.longest_seq_len, page_tokens)
    group = heads // kv_heads
    roomy = head_size <= 128 and shared_memory_kib() > 128
    rows, stages = (MOST_ROWS, STAGES) if roomy else (FEW_ROWS, FEW_STAGES)
    # More query heads of a KV head are split over programs: keys are then read again, but rows fit in registers.
    at_once, together, splits = programs(heads, kv_heads, rows)
    groups = triton.cdiv(blocks.blocks, together)
    query = query if query.stride(2) == 1 else query.contiguous()
    mass = torch.empty(heads, blocks.blocks, pages, dtype=torch.float32, device=query.device)
    tiles, segments = triton.cdiv(pages, KEY_TILE // page_tokens), triton.cdiv(blocks.longest_seq_len, SEGMENT)
    of_a_group = kv_heads * splits * rows
    at_a_time = min(max(SCRATCH_BYTES // (of_a_group * kept_bytes(pages, tiles)), 1), groups)
    kept_mass = torch.empty(at_a_time * of_a_group * pages, dtype=torch.float16, device=query.device)
    kept_most = torch.empty(at_a_time * of_a_group * tiles, dtype=torch.float32, device=query.device)
    partials = torch.empty(at_a_time * of_a_group * segments * 2, dtype=torch.float32, device=query.device)
    sizes = {"GROUP": group, "BLOCKS": together, "HEADS": at_once, "SAMPLES": SAMPLED_QUERIES, "PAGE": page_tokens}
    for first_group in range(0, groups, at_a_time):
        launched = min(at_a_time, groups - first_group)
        segment_masses_kernel[(launched * segments, kv_heads, splits)](
            query,
            cache,
            chunks.block_table,
            kept_mass,
            kept_most,
            partials,
            blocks.first_query,
            blocks.last_query,
            blocks.first_token,
            blocks.chunk,
            blocks.table_row,
            first_group,
            segments,
            kv_heads,
            blocks.blocks,
            pages,
            chunks.scale * LOG2_E,
            chunks.block_table.stride(0),
            query.stride(0),
            query.stride(1),
            cache.stride(0),
            cache.stride(1),
            cache.stride(2),
            CACHE_BLOCK=cache.shape[2],
            HEAD_SIZE=head_size,
            HEAD_TILE=product_tile(head_size),
            GROUPS=KEY_GROUPS,
            TILE=KEY_TILE,
            SEGMENT=SEGMENT,
            num_warps=WARPS,
            num_stages=stages,
            **sizes,
        )
        page_masses_kernel[(launched * triton.cdiv(pages, PAGE_TILE * PAGE_TILES), kv_heads, splits)](
            mass,
            kept_mass,
            kept_most,
            partials,
            blocks.first_query,
            blocks.last_query,
            first_group,
            segments,
            kv_heads,
            blocks.blocks,
            pages,
            TILE=KEY_TILE,
            SEGMENT=SEGMENT,
            PAGE_TILE=PAGE_TILE,
            PAGE_TILES=PAGE_TILES,
            num_warps=WARPS,
            **sizes,
        )
    return mass


def sampled_mass(
    query: torch.Tensor, keys: PlainKeys, scale: float, query_block_tokens: int, page_tokens: int
) -> torch.Tensor:
    """Equal to `reference.sampled_mass` but for rounding; arguments as there, float32."""
    blocks = one_chunk(query.shape[0], keys.seq_len, query_block_tokens, query.device)
    chunks = PromptChunks(blocks, query, (keys,), keys.block_table.unsqueeze(0), scale)
    return chunk_sampled_mass(chunks, page_tokens)
