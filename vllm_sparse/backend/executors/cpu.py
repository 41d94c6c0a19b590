"""vLLM's CPU kernel as executor."""

from __future__ import annotations

import torch

from vllm_sparse.step.launch import Executor, Launch


class CpuExecutor(Executor):
    """vLLM's `cpu_attention_with_kv_cache`. It packs keys inside a block, so a page is a whole block.

    Args:
        isa: vLLM's name of the packing.
        kv_cache_dtype: vLLM's name of the cache's dtype.
        soft_cap: on the layer's logits; 0: none.
        sinks: ``[query_heads]`` logits of the layer's sinks, if it has some.
    """

    def __init__(self, isa: str, kv_cache_dtype: str, soft_cap: float = 0.0, sinks: torch.Tensor | None = None) -> None:
        self.isa = isa
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = soft_cap
        # The kernel takes no other dtypes.
        self.sinks = sinks if sinks is None or sinks.dtype == torch.bfloat16 else sinks.float()

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        if self.sinks is None:
            self._run(launch, query, output, kv_cache, scale, None)
            return
        # A launch has one set of sinks, and rows have different heads.
        assert launch.list_head is not None, "rows tell their heads"
        heads = query.shape[1]
        for head in torch.unique(launch.list_head).tolist():
            rows = (launch.list_head == head).nonzero().squeeze(1)
            part, tokens = _part(launch, rows)
            attended = torch.empty_like(query[tokens])
            sinks = self.sinks[head * heads : (head + 1) * heads]
            self._run(part, query[tokens], attended, kv_cache, scale, sinks)
            output[tokens] = attended

    def _run(
        self,
        launch: Launch,
        query: torch.Tensor,
        output: torch.Tensor,
        kv_cache: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """One call of the kernel; arguments as of `run`, and the sinks of a row's heads."""
        from vllm import _custom_ops as ops

        blocks, kv_heads, block_size, double_head_size = kv_cache.shape
        head_size = double_head_size // 2
        if launch.page_size_tokens != block_size:
            raise ValueError(
                f"the CPU kernel reads whole KV-cache blocks of {block_size} tokens, "
                f"got pages of {launch.page_size_tokens}"
            )
        pages = kv_cache.view(blocks * kv_heads, 1, 2 * block_size, head_size)
        key_cache, value_cache = pages.chunk(2, dim=2)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=launch.kept_tokens.shape[0],
            num_heads=query.shape[1],
            num_kv_heads=1,
            head_dim=head_size,
            seq_lens=launch.kept_tokens,
            dtype=query.dtype,
            query_start_loc=launch.query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=launch.query_starts,
            seq_lens=launch.kept_tokens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=launch.pages,
            softcap=self.soft_cap,
            scheduler_metadata=schedule,
            s_aux=sinks,
            kv_cache_dtype=self.kv_cache_dtype,
        )


def _part(launch: Launch, rows: torch.Tensor) -> tuple[Launch, torch.Tensor]:
    """A launch of some of its rows, and the places of their query tokens.

    Args:
        launch: of all rows.
        rows: int64 ``[part]``.
    """
    starts = launch.query_starts[rows].long()
    lengths = launch.query_starts[rows + 1].long() - starts
    part_starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    shift = (starts - part_starts[:-1]).repeat_interleave(lengths)
    part = Launch(
        part_starts.int(),
        launch.max_query_tokens,
        launch.pages[rows],
        launch.kept_tokens[rows],
        launch.page_size_tokens,
    )
    return part, torch.arange(int(part_starts[-1])) + shift
