"""What the baselines `random` and `oracle` have in common: lists of a given length, whose choice is all that differs.

They are there to be compared with. A method that does not beat `random` at equal density knows nothing; what it lacks
of `oracle` is what a better choice could still gain.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import TopTokensMethod
from vllm_sparse.methods.knobs import (
    KNOBS,
    LIMITED_BUDGET,
    BudgetTokens,
    DenseLayers,
    ListPer,
    QueryBlockTokens,
    RecentTokens,
    SinkTokens,
)
from vllm_sparse.methods.prefill import Layer, PrefillMethod, mean_reach
from vllm_sparse.step.roles import Role

PAGE_TOKENS = 32


@dataclass(frozen=True, config=KNOBS)
class PrefillBaseline(PrefillMethod):
    """Read the pages of 32 tokens that score best, up to `density` of what a query block can reach.

    The budget counts the forced tokens and is rounded up to pages. Forced are the first `sink_tokens` and all tokens
    from `recent_tokens` before the query block to its last token. Since the budget follows from the query block's own
    position, prompt chunks that start at multiples of `query_block_tokens` choose as the whole prompt would.
    """

    # A baseline to compare with.
    enabled_by_default: ClassVar[bool] = False
    page_tokens: ClassVar[int] = PAGE_TOKENS

    density: Annotated[
        float,
        Field(gt=0, le=1, allow_inf_nan=False, description="share of the tokens in reach that a query block reads"),
    ] = 0.125
    sink_tokens: SinkTokens = 128
    recent_tokens: Annotated[
        int, Field(ge=0, le=1 << 16, description="tokens before a query block, always read"), LIMITED_BUDGET
    ] = 128
    dense_layers: DenseLayers = 0
    query_block_tokens: QueryBlockTokens = 128
    list_per: ListPer = "query_head"

    @property
    def exactly_dense(self) -> bool:
        return self.density >= 1

    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        reach = mean_reach(query_tokens, seq_len)
        return min(max(self.density * reach, self.sink_tokens + self.recent_tokens + self.query_block_tokens), reach)

    @abstractmethod
    def page_scores(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        """What each page is worth to each query block; arguments as in `select`.

        Returns:
            floating point ``[query_heads, query_blocks, pages]``, finite.
        """

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        """Kept pages of 32 tokens: bool ``[query_heads, query_blocks, pages]``; of equal scores the lower page wins."""
        first_query, last_query = query_blocks(query.shape[0], keys.seq_len, self.query_block_tokens, query.device)
        first_token = torch.arange(0, keys.seq_len, PAGE_TOKENS, device=query.device)
        in_reach = first_token <= last_query.unsqueeze(1)
        band_start = (first_query - self.recent_tokens).unsqueeze(1)
        forced = in_reach & ((first_token < self.sink_tokens) | (first_token + PAGE_TOKENS > band_start))
        competes = in_reach & ~forced
        # In float64 `density` of a context is not rounded up to a token more than that.
        budget_pages = ((last_query + 1).double() * self.density / PAGE_TOKENS).ceil().long()
        free = (budget_pages - forced.sum(1)).clamp(min=0).unsqueeze(1)
        scores = self.page_scores(query, keys, scale, layer).masked_fill(~competes, float("-inf"))
        order = scores.argsort(dim=2, descending=True, stable=True)
        place = torch.arange(order.shape[2], device=query.device)
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, order, (place < free).expand_as(order))
        return forced | (best & competes)


@dataclass(frozen=True, config=KNOBS)
class DecodeBaseline(TopTokensMethod):
    """Read `budget_tokens` in each layer: the first `sink_tokens`, the last `recent_tokens`, and what scores best."""

    # A baseline to compare with. Each decode method takes CUDA graphs of its own, and so time at start-up.
    enabled_by_default: ClassVar[bool] = False
    shares_lists: ClassVar[bool] = False

    budget_tokens: BudgetTokens = 2048
    sink_tokens: SinkTokens = 16
    recent_tokens: RecentTokens = 64
    dense_layers: DenseLayers = 0

    def __post_init__(self) -> None:
        self.check_budget()

    def layer_roles(self, num_layers: int) -> list[Role]:
        dense = min(self.dense_layers, num_layers)
        return [Role.DENSE] * dense + [Role.WRITE_AND_READ] * (num_layers - dense)
