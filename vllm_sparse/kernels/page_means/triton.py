"""Mean key of each page in Triton: a thread adds up its numbers of one page, and reads several keys of it at once.

So sums need no exchange between threads, and enough loads are in flight for the speed of the memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import key_pointers
from vllm_sparse.keys import PlainKeys

# Numbers of a key of each page of a program: one load of 16 bytes in bfloat16 for each of its 128 threads.
TILE_NUMBERS = 1024
# Keys of a page that are read at once.
KEYS = 8


# Lengths change with every chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["context", "pages"])
def page_means_kernel(
    cache_pointer,
    block_table_pointer,
    mean_pointer,
    context,
    pages,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    CACHE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_TILE: tl.constexpr,
    KEYS: tl.constexpr,
):
    i_kv_head = tl.program_id(1)
    o_page = tl.program_id(0) * PAGE_TILE + tl.arange(0, PAGE_TILE)
    o_dim = tl.arange(0, HEAD_TILE)
    in_head = o_dim < HEAD_SIZE
    first = o_page * PAGE
    p_head = cache_pointer + i_kv_head * cache_head_stride
    p_first = key_pointers(
        p_head, block_table_pointer, first, first < context, cache_block_stride, cache_token_stride, CACHE_BLOCK
    )
    b_sum = tl.zeros([PAGE_TILE, HEAD_TILE], tl.float32)
    for offset in range(0, PAGE, KEYS):
        o_offset = offset + tl.arange(0, KEYS)[:, None]
        o_key = first + o_offset
        live = o_key < context
        if CACHE_BLOCK % PAGE == 0:
            # A page lies in one block, which is looked up only once.
            p_key = p_first + o_offset * cache_token_stride
        else:
            p_key = key_pointers(
                p_head, block_table_pointer, o_key, live, cache_block_stride, cache_token_stride, CACHE_BLOCK
            )
        b_key = tl.load(p_key[:, :, None] + o_dim, mask=live[:, :, None] & in_head, other=0.0)
        b_sum += tl.sum(b_key.to(tl.float32), axis=0)
    # Pages past the last one are not stored; their length only must not be 0.
    length = tl.maximum(tl.minimum(context - first, PAGE), 1)
    o_out = (i_kv_head * pages + o_page)[:, None] * HEAD_SIZE + o_dim[None, :]
    tl.store(mean_pointer + o_out, b_sum / length[:, None], mask=(o_page < pages)[:, None] & in_head[None, :])


def page_means(keys: PlainKeys, page_tokens: int) -> torch.Tensor:
    """Equal to `reference.page_means` up to float32 rounding; arguments as there."""
    pages = triton.cdiv(keys.context_tokens, page_tokens)
    cache = keys.kv_cache
    head_tile = max(triton.next_power_of_2(keys.head_size), 16)
    page_tile = max(TILE_NUMBERS // head_tile, 1)
    means = torch.empty(keys.num_kv_heads, pages, keys.head_size, dtype=torch.float32, device=cache.device)
    page_means_kernel[(triton.cdiv(pages, page_tile), keys.num_kv_heads)](
        cache,
        keys.block_table,
        means,
        keys.context_tokens,
        pages,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        HEAD_SIZE=keys.head_size,
        HEAD_TILE=head_tile,
        PAGE=page_tokens,
        PAGE_TILE=page_tile,
        KEYS=min(KEYS, page_tokens),
        num_warps=4,
    )
    return means
