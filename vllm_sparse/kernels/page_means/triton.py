"""Mean key of each page in Triton: one program a page and KV head, with few warps, so that threads add on their own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_key_block
from vllm_sparse.keys import PlainKeys

# Numbers that a warp reads at once: 16 loads of 16 bytes a thread in bfloat16.
WARP_NUMBERS = 4096


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
):
    i_page = tl.program_id(0)
    i_kv_head = tl.program_id(1)
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
    )
    b_mean = tl.sum(b_key.to(tl.float32), axis=0) / tl.minimum(context - i_page * PAGE, PAGE)
    tl.store(mean_pointer + (i_kv_head * pages + i_page) * HEAD_SIZE + o_dim, b_mean, mask=in_head)


def warps(page_tokens: int, head_tile: int) -> int:
    """Warps of a program."""
    return min(max(page_tokens * head_tile // WARP_NUMBERS, 1), 8)


def page_means(keys: PlainKeys, page_tokens: int) -> torch.Tensor:
    """Equal to `reference.page_means` up to float32 rounding; arguments as there."""
    pages = triton.cdiv(keys.context_tokens, page_tokens)
    cache = keys.kv_cache
    head_tile = max(triton.next_power_of_2(keys.head_size), 16)
    means = torch.empty(keys.num_kv_heads, pages, keys.head_size, dtype=torch.float32, device=cache.device)
    page_means_kernel[(pages, keys.num_kv_heads)](
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
        num_warps=warps(page_tokens, head_tile),
    )
    return means
