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
    top_level,
)
from vllm_sparse.kernels.low_bit_scores.tables import BATCH_PAGES, MiddlePages
from vllm_sparse.kernels.low_bit_scores.triton import quantise_rows
from vllm_sparse.step.chunks import PromptChunks

# These equal the constants in csrc/sm90/quantised_pages.cuh and low_bit_scores.cu.
HEAD_SIZE = 128
PAGE_NUMBERS = 8
SCORED_ROWS = 64


def can_run(chunks: PromptChunks) -> bool:
    """Whether the kernels are installed and support these inputs; otherwise Triton runs."""
    query, keys = chunks.query, chunks.keys[0]
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


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def quantise_keys(
    chunks: PromptChunks, middle: MiddlePages, part: range, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `triton.quantise_keys`, in the layout of csrc/sm90/quantised_pages.cuh.

    Returns:
        `levels`: int8 ``[kv_heads, pages, 32, 128]``.
        `mean`: ``[kv_heads, pages / 32, 2, 32, 64]`` in the cache's dtype.
        `numbers`: float32 ``[kv_heads, pages, 8]``: the four groups' `scale`, `radius`, `error`, two unused.
        Each row of 128 bytes of `levels` and `mean` has its 16-byte pieces swizzled. Pages that fill up a chunk's last
        batch are undefined.
    """
    keys, blocks = chunks.keys[0], chunks.blocks
    cache, kv_heads = keys.kv_cache, keys.num_kv_heads
    first_page = middle.starts[part.start]
    pages = middle.starts[part.stop] - first_page
    levels = torch.empty(kv_heads, pages, PAGE_TOKENS, HEAD_SIZE, dtype=torch.int8, device=cache.device)
    halves = 2, BATCH_PAGES, HEAD_SIZE // 2
    mean = torch.empty(kv_heads, pages // BATCH_PAGES, *halves, dtype=cache.dtype, device=cache.device)
    numbers = torch.empty(kv_heads, pages, PAGE_NUMBERS, dtype=torch.float32, device=cache.device)
    launch(
        "vllm_sparse_quantise_keys",
        cache.device,
        _pointer(cache),
        _pointer(chunks.block_table),
        _pointer(middle.batch_chunk[first_page // BATCH_PAGES :]),
        _pointer(middle.page_start),
        _pointer(middle.pages),
        _pointer(blocks.table_row),
        _pointer(levels),
        _pointer(mean),
        _pointer(numbers),
        ctypes.c_longlong(chunks.block_table.stride(0)),
        *(ctypes.c_longlong(stride) for stride in cache.stride()[:3]),
        keys.block_size_tokens,
        first_page,
        pages,
        kv_heads,
        top_level(bits),
        ctypes.c_float(TINY),
        ctypes.c_float(ROUNDING),
        int(cache.dtype == torch.float16),
    )
    return levels, mean, numbers


def kept_maps(chunks: PromptChunks, middle: MiddlePages, log_tau: torch.Tensor, scoring: LowBitScoring) -> torch.Tensor:
    """As `triton.kept_maps`, for chunks that `can_run`.

    In query blocks of 128, the page bounds decide each half of 64 rows alone, which may score fewer keys.
    """
    assert KEY_GROUPS * 2 == 8, "a group is the two columns of eight that a thread of a warp holds"
    query, keys, blocks = chunks.query, chunks.keys[0], chunks.blocks
    tokens, heads, _ = query.shape
    key_pages = -(-blocks.longest_seq_len // PAGE_TOKENS)
    query_levels, row_numbers = quantise_rows(chunks, log_tau, scoring)
    halves = scoring.query_block_tokens // SCORED_ROWS
    # The last query block of a chunk may have no second half, which keeps nothing then.
    make = torch.zeros if halves > 1 else torch.empty
    kept = make(heads, blocks.blocks, halves, key_pages, dtype=torch.bool, device=query.device)
    for part in middle.parts(keys.num_kv_heads):
        key_levels, mean, page_numbers = quantise_keys(chunks, middle, part, scoring.bits)
        first_tile, end_tile = middle.tile_starts[part.start], middle.tile_starts[part.stop]
        launch(
            "vllm_sparse_low_bit_scores",
            query.device,
            _pointer(query),
            _pointer(query_levels),
            _pointer(row_numbers),
            _pointer(key_levels),
            _pointer(mean),
            _pointer(page_numbers),
            _pointer(kept),
            _pointer(middle.tile_chunk[first_tile:]),
            _pointer(middle.tile_row[first_tile:]),
            _pointer(blocks.chunk_start),
            _pointer(blocks.first_query),
            _pointer(blocks.first_token),
            _pointer(blocks.seq_len),
            _pointer(middle.page_start),
            _pointer(middle.pages),
            ctypes.c_longlong(query.stride(0)),
            ctypes.c_longlong(query.stride(1)),
            end_tile - first_tile,
            tokens,
            blocks.blocks,
            middle.starts[part.start],
            page_numbers.shape[1],
            key_pages,
            scoring.sink_tokens // PAGE_TOKENS,
            scoring.local_tokens,
            scoring.query_block_tokens,
            heads,
            heads // keys.num_kv_heads,
            int(scoring.page_bounds),
            ctypes.c_float(chunks.scale),
            int(query.dtype == torch.float16),
        )
    return kept.squeeze(2) if halves == 1 else kept.any(2)
