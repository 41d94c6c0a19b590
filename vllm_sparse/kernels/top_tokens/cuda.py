"""The best units of decode rows as token lists, with the CUDA kernel of csrc/sm90: one thread block cluster a list."""

from __future__ import annotations

import ctypes

import torch

from vllm_sparse.kernels.cuda_library import launch
from vllm_sparse.step.rows import DecodeRows, RowScores, TokenLists


def top_tokens(scores: RowScores, rows: DecodeRows, knobs: torch.Tensor, lists: TokenLists) -> None:
    """Equal to `reference.top_tokens`; arguments as there, on a device for which `cuda_library` returns a library."""
    assert scores.values.is_contiguous()
    assert knobs.stride(1) == rows.block_table.stride(1) == lists.slots.stride(1) == 1
    count, kv_heads = rows.query.shape[0], rows.kv_cache.shape[1]
    tensors = (
        *(scores.values, scores.starts, rows.seq_lens, knobs),
        *(rows.block_table, lists.slots, lists.kept_tokens),
    )
    strides = scores.head_stride, knobs.stride(0), rows.block_table.stride(0), lists.slots.stride(0)
    launch(
        "vllm_sparse_top_tokens",
        rows.query.device,
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_longlong(stride) for stride in strides),
        count,
        kv_heads,
        scores.unit_tokens,
        rows.kv_cache.shape[2],
    )
