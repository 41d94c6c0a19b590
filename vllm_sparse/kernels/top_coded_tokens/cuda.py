"""The tokens of decode rows by their keys' codes, with the CUDA kernels of csrc/sm90."""

from __future__ import annotations

import ctypes

import torch

from vllm_sparse.kernels.cuda_library import cuda_library, launch
from vllm_sparse.kernels.page_summaries import SummaryKind
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists

# These equal what csrc/sm90/top_coded_tokens.cu is compiled for.
HEAD_SIZES = (64, 128)
PAGES = (32, 64, 128)
LARGEST_GROUP = 8
# Of a page's tokens, each with its largest products.
GROUPS = 8


def can_run(rows: DecodeRows, kind: SummaryKind) -> bool:
    """Whether the kernels are installed and support the rows' heads and pages; otherwise Triton runs."""
    query, cache = rows.query, rows.kv_cache
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and cache.dtype in (query.dtype, torch.float8_e4m3fn)
        and query.shape[2] in HEAD_SIZES
        and kind.page_tokens in PAGES
        and query.shape[1] // cache.shape[1] <= LARGEST_GROUP
        and all(stride % 4 == 0 for stride in (*query.stride()[:2], *cache.stride()[:3]))
        and query.data_ptr() % 8 == cache.data_ptr() % (4 * cache.itemsize) == 0
        and cuda_library(query.device) is not None
    )


def top_coded_tokens(
    rows: DecodeRows, knobs: torch.Tensor, kind: SummaryKind, place: RowsPlace, lists: TokenLists
) -> None:
    """As the public function, where `can_run` says so; codes of filled pages are stored if a block is one page.

    Tokens whose attention differs by less than 2.2 % (1/32 of a binary digit), and those with less than 2^-32 of it,
    are equal to it; of equal ones the first are taken.
    """
    assert place.summaries is not None
    assert place.summaries.is_contiguous()
    assert rows.query.stride(2) == rows.kv_cache.stride(3) == 1
    assert knobs.stride(1) == rows.block_table.stride(1) == lists.slots.stride(1) == place.members.stride(0) == 1
    library, device = cuda_library(rows.query.device), rows.query.device
    assert library is not None
    count, query_heads, head_size = rows.query.shape
    _, kv_heads, block_size, _ = rows.kv_cache.shape
    group, page, capacity = query_heads // kv_heads, kind.page_tokens, place.capacity_tokens
    head_pairs = 1 if group <= 2 else 2 if group <= 4 else 4
    splits = library.vllm_sparse_top_coded_tokens_splits(count * kv_heads)
    # A row's pages begin where its starts do, rounded down, and one page later for each row before it.
    shape = kv_heads, capacity // page + count
    products = torch.empty(*shape, page * head_pairs, 2, dtype=torch.float16, device=device)
    largest = torch.empty(*shape, GROUPS * head_pairs, 2, dtype=torch.float16, device=device)
    offsets = torch.empty(*shape, 2 * head_pairs, dtype=torch.float32, device=device)
    partials = torch.empty(count * kv_heads, splits, LARGEST_GROUP, 2, dtype=torch.float32, device=device)
    members = place.members.data_ptr() if page == block_size else 0
    pointers = (
        *(rows.query.data_ptr(), rows.kv_cache.data_ptr(), place.summaries.data_ptr(), place.starts.data_ptr()),
        *(rows.seq_lens.data_ptr(), members, knobs.data_ptr(), rows.block_table.data_ptr()),
        *(lists.slots.data_ptr(), lists.kept_tokens.data_ptr()),
        *(products.data_ptr(), largest.data_ptr(), offsets.data_ptr(), partials.data_ptr()),
    )
    numbers = (
        *(*rows.query.stride()[:2], *rows.kv_cache.stride()[:3], knobs.stride(0), rows.block_table.stride(0)),
        *(lists.slots.stride(0), capacity, rows.block_table.shape[1] * block_size),
    )
    launch(
        "vllm_sparse_top_coded_tokens",
        device,
        *(ctypes.c_void_p(pointer) for pointer in pointers),
        *(ctypes.c_longlong(number) for number in numbers),
        ctypes.c_float(rows.scale),
        *(count, kv_heads, group, head_pairs, head_size, page, block_size, splits),
        *(int(rows.query.dtype == torch.bfloat16), int(rows.kv_cache.dtype == torch.float8_e4m3fn)),
    )
