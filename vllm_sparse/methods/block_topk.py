"""Block top-k decode (Kinetics, arXiv 2506.05333) and Quest (arXiv 2406.10774): the pages whose summary scores best."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.candidate_tokens import COVERAGE_UNITS, best_candidates
from vllm_sparse.kernels.page_scores import page_scores
from vllm_sparse.kernels.page_summaries import SummaryKind, read_summaries
from vllm_sparse.kernels.top_tokens import TokenBudget, top_pages, top_tokens
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import DecodeMethod, LayerMemory, TopTokensMethod, choosing_in_each_layer
from vllm_sparse.methods.knobs import KNOBS, BudgetTokens, Coverage, DenseLayers, RecentTokens, SinkTokens
from vllm_sparse.pages import PageList
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists


@dataclass(frozen=True, config=KNOBS)
class BlockTopk(TopTokensMethod):
    """In each layer, read the pages of `page_tokens` whose keys, by what is kept of them, suit the query best.

    With `scores` ``bounds`` a page is worth the largest product that the least and the largest number of each dimension
    allow, as in Quest: no key of the page has a larger one. With ``mean`` it is worth its mean key's, as in Kinetics,
    which halves what a step reads to choose, and loses single keys among others that point elsewhere. Lists are per KV
    head, with the query heads of a group merged by the maximum of their softmax over the pages. Sink and recent tokens
    are forced into every list; the newest token's page is always read. Where the executor's pages are coarser, one is
    worth the best scored page in it.

    With a `candidate_factor` above 1 the pages are only candidates, so many times the budget of them, and of their
    tokens those are read whose exact attention is largest, query heads merged by the sum of their softmax over the
    candidates. With a `coverage` below 1 a list ends where it holds that share of the candidates' attention; the budget
    is then its most. Both score exactly what they read summaries of, which no paper does.

    The summaries are kept beside the KV cache, a ``1 / page_tokens`` of it with ``bounds``, half that with ``mean``, so
    what they are is the server's choice. ``float8_bounds`` take half of ``bounds`` in a cache of 16-bit numbers. They
    are rounded to the nearest, so a key may score a little more than they allow.
    """

    name: ClassVar[str] = "blocktopk"
    # Its page summaries take memory beside the KV cache.
    enabled_by_default: ClassVar[bool] = False
    server_knobs: ClassVar[tuple[str, ...]] = ("page_tokens", "scores")
    scores_tokens: ClassVar[bool] = True
    shares_lists: ClassVar[bool] = False
    former_names: ClassVar[dict[str, str]] = {
        "budget": "budget_tokens",
        "block": "page_tokens",
    }

    budget_tokens: BudgetTokens = 2048
    sink_tokens: SinkTokens = 16
    recent_tokens: RecentTokens = 64
    dense_layers: DenseLayers = 2
    page_tokens: Annotated[Literal[16, 32, 64], Field(description="tokens of a scored page")] = 16
    scores: Annotated[
        Literal["mean", "bounds", "float8_bounds"],
        Field(description="what a page is scored by: its mean key, or bounds of its keys, also in 8-bit numbers"),
    ] = "bounds"
    candidate_factor: Annotated[
        int,
        Field(
            ge=1,
            le=16,
            description="how many budgets of tokens the pages hold among which exact scores choose; 1 reads the pages",
        ),
    ] = 1
    coverage: Coverage = 1.0

    def __post_init__(self) -> None:
        self.check_budget()

    @property
    def summaries(self) -> SummaryKind:
        return SummaryKind(self.page_tokens, self.scores)

    @property
    def weighs_masses(self) -> bool:
        return True

    def layer_roles(self, num_layers: int) -> list[Role]:
        return choosing_in_each_layer(self.dense_layers, num_layers)

    @property
    def scores_candidates(self) -> bool:
        """Candidates have exact scores, in a second stage."""
        return self.candidate_factor > 1 or self.coverage < 1

    @property
    def candidate_tokens(self) -> int:
        return self.candidate_factor * self.budget_tokens if self.scores_candidates else 0

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
    ) -> PageList:
        context = keys.seq_len
        unit: int = self.page_tokens
        scores = page_scores(query, read_summaries(keys, self.summaries), scale)
        budget = TokenBudget(self.budget_tokens, self.sink_tokens, self.recent_tokens)
        if self.scores_candidates:
            kept = replace(budget, budget_tokens=self.budget_tokens * self.candidate_factor)
            candidates = top_pages(scores, context, unit, unit, kept)
            if self.candidate_factor == 1:
                budget = replace(budget, budget_tokens=candidates.pages.shape[1] * unit)
            return best_candidates(query, keys, scale, candidates, page_size_tokens, budget, self.coverage)
        if unit % page_size_tokens:
            scores = _best_overlapped(scores, unit, page_size_tokens, context)
            unit = page_size_tokens
        return top_pages(scores, context, unit, page_size_tokens, budget)

    @property
    def unit_tokens(self) -> int:
        return 1 if self.candidate_factor > 1 else self.page_tokens

    def row_knobs(self) -> tuple[int, ...]:
        return *super().row_knobs(), self.candidate_factor, round(self.coverage * COVERAGE_UNITS)

    def serves(self, method: DecodeMethod, max_seq_len: int) -> bool:
        # What is launched in a layer is the server's; of that a row may do less.
        return (
            isinstance(method, BlockTopk)
            and method.candidate_factor <= self.candidate_factor
            and (method.coverage == 1 or self.coverage < 1)
        )

    def choose_rows(self, rows: DecodeRows, knobs: torch.Tensor, place: RowsPlace, lists: TokenLists) -> None:
        # Imported here: there is Triton only where there is a GPU.
        from vllm_sparse.kernels.candidate_tokens import triton as candidate_tokens
        from vllm_sparse.kernels.page_scores import triton as page_scores
        from vllm_sparse.kernels.page_summaries.triton import store_newest_summaries

        assert place.summaries is not None
        store_newest_summaries(replace(rows, seq_lens=place.members), self.summaries, place.summaries)
        scores = page_scores.page_scores(rows, self.summaries, place.summaries, place.starts, place.capacity_tokens)
        if not self.scores_candidates:
            top_tokens(scores, rows, knobs, lists)
            return
        room = candidate_tokens.CandidateRoom(
            place.starts, place.capacity_tokens, self.candidate_factor, self.coverage < 1
        )
        candidate_tokens.best_candidates(scores, rows, knobs, room, lists)


def _best_overlapped(scores: torch.Tensor, block: int, page_size_tokens: int, seq_len: int) -> torch.Tensor:
    """Of the scores of blocks, the largest that each page overlaps; neither size has to divide the other."""
    first_token = torch.arange(0, seq_len, page_size_tokens, device=scores.device)
    first = first_token // block
    last = (first_token + page_size_tokens - 1).clamp(max=seq_len - 1) // block
    best = scores[:, first]
    for step in range(1, page_size_tokens // block + 2):
        best = torch.maximum(best, scores[:, torch.minimum(first + step, last)])
    return best
