"""Mean, minimum and maximum key of each page in Triton: one program a page and KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.common.triton import load_keys
from vllm_sparse.kernels.page_summaries.reference import PageSummaries
from vllm_sparse.keys import PlainKeys


# Lengths change with every chunk; specialising on them would compile in the middle of serving.
@triton.jit(do_not_specialize=["context", "pages"])
def page_summaries_kernel(
    cache_pointer,
    block_table_pointer,
    mean_pointer,
    minimum_pointer,
    maximum_pointer,
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
    o_key = i_page * PAGE + tl.arange(0, PAGE)
    o_dim = tl.arange(0, HEAD_TILE)
    live = o_key < context
    in_head = o_dim < HEAD_SIZE
    b_key = load_keys(
        cache_pointer,
        block_table_pointer,
        o_key,
        live,
        i_kv_head,
        o_dim,
        in_head,
        cache_block_stride,
        cache_head_stride,
        cache_token_stride,
        CACHE_BLOCK,
    ).to(tl.float32)
    b_mean = tl.sum(b_key, axis=0) / tl.minimum(context - i_page * PAGE, PAGE)
    b_minimum = tl.min(tl.where(live[:, None], b_key, float("inf")), axis=0)
    b_maximum = tl.max(tl.where(live[:, None], b_key, float("-inf")), axis=0)
    o_out = (i_kv_head * pages + i_page) * HEAD_SIZE + o_dim
    tl.store(mean_pointer + o_out, b_mean, mask=in_head)
    tl.store(minimum_pointer + o_out, b_minimum, mask=in_head)
    tl.store(maximum_pointer + o_out, b_maximum, mask=in_head)


def page_summaries(keys: PlainKeys, page_tokens: int) -> PageSummaries:
    """Equal to `reference.page_summaries`; arguments as there."""
    pages = -(-keys.context_tokens // page_tokens)
    cache = keys.kv_cache
    head_tile = max(triton.next_power_of_2(keys.head_size), 16)
    shape = (3, keys.num_kv_heads, pages, keys.head_size)
    summaries = PageSummaries(*torch.empty(shape, dtype=torch.float32, device=cache.device).unbind(0))
    page_summaries_kernel[(pages, keys.num_kv_heads)](
        cache,
        keys.block_table,
        summaries.mean,
        summaries.minimum,
        summaries.maximum,
        keys.context_tokens,
        pages,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        CACHE_BLOCK=keys.block_size_tokens,
        HEAD_SIZE=keys.head_size,
        HEAD_TILE=head_tile,
        PAGE=page_tokens,
        # A page of 128 wide keys does not fit the registers of four warps.
        num_warps=4 if page_tokens * head_tile <= 16384 else 8,
    )
    return summaries
