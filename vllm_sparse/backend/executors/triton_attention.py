"""vLLM's Triton attention as executor (GPUs)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm_sparse.backend.executors.float8 import NO_SCALES, ValueScale
from vllm_sparse.backend.executors.head_pages import HeadPages
from vllm_sparse.step.launch import Executor, Launch

# Of decode launches that divide each row among several programs, as vLLM's backend does for so few rows.
MOST_DIVIDED_ROWS = 128
PARTS = 16
# Keys that a program of the kernel reads together, at most; it looks up their pages without asking where a row ends.
TILE_TOKENS = 128


class TritonExecutor(Executor):
    """vLLM's `unified_attention`, as its TRITON_ATTN backend calls it; it reads pages of any size.

    Args:
        value_scale: of an FP8 cache; the scales of queries and keys are in the softmax scale.
        soft_cap: on the layer's logits; 0: none.
    """

    def __init__(self, value_scale: ValueScale | None = None, soft_cap: float = 0.0) -> None:
        self.soft_cap = soft_cap
        self._value_scale = value_scale
        self._pages = HeadPages()

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        keys, values = self._pages.of(kv_cache, launch.page_size_tokens)
        rows, heads, head_size = launch.kept_tokens.shape[0], query.shape[1], query.shape[2]
        divided: dict[str, Any] = {}
        if launch.max_query_tokens == 1 and rows <= MOST_DIVIDED_ROWS:
            divided = parts_of_rows(heads, head_size, query.device)
        scales = NO_SCALES if self._value_scale is None else self._value_scale.of_rows(rows)
        unified_attention(
            q=query if self._value_scale is None else query.to(keys.dtype),
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=launch.query_starts,
            max_seqlen_q=launch.max_query_tokens,
            seqused_k=launch.kept_tokens,
            max_seqlen_k=launch.pages.shape[1] * launch.page_size_tokens,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1),
            block_table=whole_tiles(launch.pages, launch.page_size_tokens),
            softcap=self.soft_cap,
            kv_quant_mode=KVQuantMode.NONE if self._value_scale is None else KVQuantMode.FP8_PER_TENSOR,
            **scales,
            **divided,
        )


def whole_tiles(pages: torch.Tensor, page_size_tokens: int) -> torch.Tensor:
    """Page tables whose last row, too, ends with a tile of the kernel; a copy only where they do not.

    Args:
        pages: int32 ``[rows, width]``.
        page_size_tokens: tokens of a page.
    """
    width = pages.shape[1]
    tiles = -(-width * page_size_tokens // TILE_TOKENS)
    missing = -(-tiles * TILE_TOKENS // page_size_tokens) - width
    return torch.nn.functional.pad(pages, (0, missing)) if missing else pages


@functools.lru_cache(maxsize=8)
def parts_of_rows(heads: int, head_size: int, device: torch.device) -> dict[str, Any]:
    """Where the kernel leaves the parts of rows before it adds them up; all layers share it, one after the other."""
    import triton

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(MOST_DIVIDED_ROWS, heads, PARTS, *shape, dtype=torch.float32, device=device)

    return {
        "seq_threshold_3D": MOST_DIVIDED_ROWS,
        "num_par_softmax_segments": PARTS,
        "softmax_segm_output": numbers(triton.next_power_of_2(head_size)),
        "softmax_segm_max": numbers(),
        "softmax_segm_expsum": numbers(),
    }
