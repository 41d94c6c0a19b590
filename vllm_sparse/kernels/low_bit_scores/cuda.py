"""SALE's selection with the CUDA kernels of csrc/sm90, which quantise keys and score them."""

from __future__ import annotations

import ctypes

import torch

from vllm_sparse.kernels.cuda_library import has_kernel, launch
from vllm_sparse.kernels.low_bit_scores.reference import (
    KEY_GROUPS,
    PAGE_TOKENS,
    ROUNDING,
    TINY,
    LowBitScoring,
    middle_end,
    top_level,
)
from vllm_sparse.kernels.low_bit_scores.triton import quantise_rows
from vllm_sparse.keys import PlainKeys

# These equal the constants in csrc/sm90/quantised_pages.cuh and low_bit_scores.cu.
HEAD_SIZE = 128
BATCH_PAGES = 32
PAGE_NUMBERS = 8
SCORED_ROWS = 64


def can_run(query: torch.Tensor, keys: PlainKeys) -> bool:
    """Whether the kernels are installed and support these inputs; otherwise Triton runs."""
    return (
        query.shape[2] == HEAD_SIZE
        and query.dtype in (torch.bfloat16, torch.float16)
        and keys.kv_cache.dtype == query.dtype
        and keys.block_size_tokens % (PAGE_TOKENS // 2) == 0
        and keys.kv_cache.data_ptr() % 8 == 0
        and query.stride(2) == 1
        and query.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in query.stride()[:2])
        and has_kernel("vllm_sparse_low_bit_scores", query.device)
    )


def quantise_keys(keys: PlainKeys, pages: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.quantise_keys`, in the layout of csrc/sm90/quantised_pages.cuh.

    Returns:
        `levels`: int8 ``[kv_heads, padded_pages, 32, 128]``.
        `mean`: ``[kv_heads, padded_pages / 32, 2, 32, 64]`` in the cache's dtype.
        `numbers`: float32 ``[kv_heads, padded_pages, 8]``: the four groups' `scale`, `radius`, `error`, two unused.
        Each row of 128 bytes of `levels` and `mean` has its 16-byte pieces swizzled. Pages are padded to a multiple of
        32; those from `pages` on are undefined.
    """
    cache = keys.kv_cache
    padded_pages = -(-pages // BATCH_PAGES) * BATCH_PAGES
    levels = torch.empty(keys.num_kv_heads, padded_pages, PAGE_TOKENS, HEAD_SIZE, dtype=torch.int8, device=cache.device)
    halves = 2, BATCH_PAGES, HEAD_SIZE // 2
    mean = torch.empty(keys.num_kv_heads, padded_pages // BATCH_PAGES, *halves, dtype=cache.dtype, device=cache.device)
    numbers = torch.empty(keys.num_kv_heads, padded_pages, PAGE_NUMBERS, dtype=torch.float32, device=cache.device)
    launch(
        "vllm_sparse_quantise_keys",
        cache.device,
        ctypes.c_void_p(cache.data_ptr()),
        ctypes.c_void_p(keys.block_table.data_ptr()),
        ctypes.c_void_p(levels.data_ptr()),
        ctypes.c_void_p(mean.data_ptr()),
        ctypes.c_void_p(numbers.data_ptr()),
        *(ctypes.c_longlong(stride) for stride in cache.stride()[:3]),
        keys.block_size_tokens,
        pages,
        padded_pages,
        keys.num_kv_heads,
        top_level(bits),
        ctypes.c_float(TINY),
        ctypes.c_float(ROUNDING),
        int(cache.dtype == torch.float16),
    )
    return levels, mean, numbers


def kept_map(
    query: torch.Tensor, keys: PlainKeys, scale: float, log_tau: torch.Tensor, scoring: LowBitScoring
) -> torch.Tensor:
    """Equal to `reference.kept_map` up to rounding; arguments as there, for which `can_run` is true.

    In query blocks of 128, the page bounds decide each half of 64 rows alone, which may score fewer keys.
    """
    assert KEY_GROUPS * 2 == 8, "a group is the two columns of eight that a thread of a warp holds"
    local_tokens, query_block_tokens = scoring.local_tokens, scoring.query_block_tokens
    query_tokens, heads, _ = query.shape
    context = keys.seq_len
    query_block_count, key_pages = -(-query_tokens // query_block_tokens), -(-context // PAGE_TOKENS)
    pages = middle_end(query_tokens, context, local_tokens, query_block_tokens)
    if pages <= scoring.sink_tokens // PAGE_TOKENS:
        return torch.ones(heads, query_block_count, key_pages, dtype=torch.bool, device=query.device)
    key_levels, mean, page_numbers = quantise_keys(keys, pages, scoring.bits)
    query_levels, row_numbers = quantise_rows(query, keys, scale, log_tau, scoring)
    parts = query_block_tokens // SCORED_ROWS
    kept = torch.empty(heads, -(-query_tokens // SCORED_ROWS), key_pages, dtype=torch.bool, device=query.device)
    launch(
        "vllm_sparse_low_bit_scores",
        query.device,
        ctypes.c_void_p(query.data_ptr()),
        ctypes.c_void_p(query_levels.data_ptr()),
        ctypes.c_void_p(row_numbers.data_ptr()),
        ctypes.c_void_p(key_levels.data_ptr()),
        ctypes.c_void_p(mean.data_ptr()),
        ctypes.c_void_p(page_numbers.data_ptr()),
        ctypes.c_void_p(kept.data_ptr()),
        ctypes.c_longlong(query.stride(0)),
        ctypes.c_longlong(query.stride(1)),
        query_tokens,
        context,
        key_levels.shape[1],
        key_pages,
        scoring.sink_tokens // PAGE_TOKENS,
        local_tokens,
        query_block_tokens,
        heads,
        heads // keys.num_kv_heads,
        int(scoring.page_bounds),
        ctypes.c_float(scale),
        int(query.dtype == torch.float16),
    )
    if parts == 1:
        return kept
    padded = torch.nn.functional.pad(kept, (0, 0, 0, -kept.shape[1] % parts))
    return padded.view(heads, query_block_count, parts, key_pages).any(2)
