"""StreamingLLM (arXiv 2309.17453, ICLR 2024): the first tokens and a window of the last ones, whatever their scores."""

from __future__ import annotations

import functools
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.kernels.top_tokens import TokenBudget, top_pages, top_tokens
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import LayerMemory, TopTokensMethod
from vllm_sparse.methods.knobs import (
    KNOBS,
    LIMITED_BUDGET,
    UNBOUNDED_TOKENS,
    DenseLayers,
    ListPer,
    QueryBlockTokens,
    SinkTokens,
)
from vllm_sparse.methods.prefill import Layer, PrefillMethod, mean_reach
from vllm_sparse.pages import PageList
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import DecodeRows, RowScores, RowsPlace, TokenLists

PAGE_TOKENS = 32
WindowTokens = Annotated[
    int,
    Field(ge=1, le=UNBOUNDED_TOKENS, description="last tokens, the query's own included, always read"),
    LIMITED_BUDGET,
]


@dataclass(frozen=True, config=KNOBS)
class Streaming(PrefillMethod):
    """Read the first `sink_tokens` and, of each query, the last `recent_tokens`: the paper's attention mask.

    A baseline that looks at no key. All query heads and layers read the same; what lies between sink and window is not
    read by any of them, so facts there are lost. Pages of 32 tokens are read whole, and a query block reads the window
    of its first query on, so each query reads at least what the paper lets it read. Positions stay those of the prompt,
    where the paper renumbers them in its cache.

    The default of 4 sink tokens is the paper's, which found that more change little.
    """

    name: ClassVar[str] = "streaming"
    # A baseline to compare with. Each decode method takes CUDA graphs of its own, and so time at start-up.
    enabled_by_default: ClassVar[bool] = False
    page_tokens: ClassVar[int] = PAGE_TOKENS

    sink_tokens: SinkTokens = 4
    recent_tokens: WindowTokens = 4096
    dense_layers: DenseLayers = 0
    query_block_tokens: QueryBlockTokens = 128
    list_per: ListPer = "kv_head"

    @property
    def exactly_dense(self) -> bool:
        return self.recent_tokens == UNBOUNDED_TOKENS

    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        kept = self.sink_tokens + self.recent_tokens + self.query_block_tokens
        return min(kept, mean_reach(query_tokens, seq_len))

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        """Kept pages of 32 tokens, perhaps some of the future: bool ``[1, query_blocks, pages]``."""
        return _kept_pages(self, query.shape[0], keys.seq_len, query.device)


@functools.lru_cache(maxsize=64)
def _kept_pages(method: Streaming, chunk: int, context: int, device: torch.device) -> torch.Tensor:
    """As `Streaming.block_mask` returns them, the same for all layers."""
    first_query, _ = query_blocks(chunk, context, method.query_block_tokens, device)
    first_token = torch.arange(0, context, PAGE_TOKENS, device=device)
    window_start = (first_query - (method.recent_tokens - 1)).unsqueeze(1)
    kept = (first_token < method.sink_tokens) | (first_token + PAGE_TOKENS > window_start)
    return kept.unsqueeze(0)


@dataclass(frozen=True, config=KNOBS)
class StreamingDecode(TopTokensMethod):
    """Read the first `sink_tokens` and the last `recent_tokens`, as `Streaming` does in the prompt.

    One list serves all layers: the first sparse layer writes it, the others read it.
    """

    name: ClassVar[str] = "streaming"
    # A baseline to compare with. Each decode method takes CUDA graphs of its own, and so time at start-up.
    enabled_by_default: ClassVar[bool] = False

    sink_tokens: SinkTokens = 4
    recent_tokens: WindowTokens = 4096
    dense_layers: DenseLayers = 0

    @property
    def budget_tokens(self) -> int:
        return self.sink_tokens + self.recent_tokens

    @classmethod
    def with_budget(cls, budget_tokens: int) -> StreamingDecode:
        return cls(recent_tokens=budget_tokens - cls.sink_tokens)

    def layer_roles(self, num_layers: int) -> list[Role]:
        first = self.dense_layers
        sparse = [Role.WRITE_AND_READ if layer == first else Role.READ for layer in range(first, num_layers)]
        return [Role.DENSE] * min(first, num_layers) + sparse

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        context, page = keys.seq_len, page_size_tokens
        scores = torch.zeros(keys.num_kv_heads, -(-context // page), device=query.device)
        budget = TokenBudget(self.budget_tokens, self.sink_tokens, self.recent_tokens)
        return top_pages(scores, context, page, page, budget)

    def choose_rows(self, rows: DecodeRows, knobs: torch.Tensor, place: RowsPlace, lists: TokenLists) -> None:
        # Sink and window are forced and fill the budget, so that any scores do: all rows and heads have the same.
        longest = rows.block_table.shape[1] * rows.kv_cache.shape[2]
        values = torch.zeros(longest, dtype=torch.float32, device=rows.query.device)
        top_tokens(RowScores(values, torch.zeros_like(place.starts), 0, 1), rows, knobs, lists)
