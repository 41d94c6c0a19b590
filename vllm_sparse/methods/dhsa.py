"""DHSA (arXiv 2510.24606): per query block, the key blocks whose keys are most like its mean query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.adaptive_blocks import adaptive_blocks
from vllm_sparse.kernels.block_scores import (
    KeyBlocks,
    PageSelection,
    best_pages,
    chunk_page_scores,
    page_scores,
    select_pages,
)
from vllm_sparse.kernels.candidate_mass import SAMPLED_QUERIES, candidate_mass, chunk_mass, scratch_bytes
from vllm_sparse.kernels.page_list import ListGrid, block_lists, query_blocks, write_lists
from vllm_sparse.kernels.page_summaries import SummaryKind, chunk_summaries, page_summaries
from vllm_sparse.kernels.sampled_mass import chunk_sampled_mass, sampled_mass
from vllm_sparse.kernels.sampled_mass import scratch_bytes as sampled_scratch_bytes
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.knobs import (
    COMPILES,
    KNOBS,
    LIMITED_BUDGET,
    UNBOUNDED_TOKENS,
    Coverage,
    DenseLayers,
    KnobError,
    ListPer,
    QueryBlockTokens,
    ScoresPer,
    SinkTokens,
    heads_with_scores,
)
from vllm_sparse.methods.prefill import (
    PAGE_ENTRY_BYTES,
    Layer,
    PrefillMethod,
    density_at,
    mean_reach,
    shared,
    tokens_with_dense_tail,
)
from vllm_sparse.pages import PageList, empty_lists
from vllm_sparse.step.chunks import PromptBlocks, PromptChunks, int_tables

# The key block of the paper's second version. Finer pages double the score map and the lists, while the executor gains
# nothing: key blocks of 16 give each page the better of two.
PAGE_TOKENS = 32
# Of attention masses, in times of the scores, which take 0.012 of dense attention on an H200: of lists that hold all
# pages 0.2, of all pages without lists 0.13.
LISTED_MASSES_WORK, ALL_MASSES_WORK = 16.0, 11.0
# Share of the pages from which on all are weighed, which costs less than to choose and to read lists.
LEAST_TO_WEIGH_ALL = 0.65
DEFAULT_COVERAGE = 0.975
# Density at 8K is 0.27 with a coverage of 0.957, 0.31 with 0.975 and 0.39 with 0.983, at 32K 0.17, 0.21 and 0.26 (means
# over chunks, Qwen2.5-Coder-0.5B, docs/methods.md): a line over the logarithm of what is left out, and a fall by a
# power of the keys in reach, taken for a little less than it was.
DENSITY_BY_LEFT_OUT, DENSITY_AT_ALL_LEFT_OUT, DENSITY_BY_REACH = 0.13, -0.145, 0.2


@plain_dataclass(frozen=True)
class PreparedChunks:
    """What the choice for prompt chunks needs in every layer; key blocks are of fixed length.

    Attributes:
        band_page: int32 ``[blocks]`` page from which on a query block reads everything.
        last_page: int32 ``[blocks]`` page of its last query.
        budget_pages: int32 ``[blocks]`` pages that it may keep, forced ones included.
        candidate_pages: int32 ``[blocks]`` pages whose mass is computed.
        first_key_block: int32 ``[chunks, pages]`` as `chunk_page_scores` takes it.
        last_key_block: likewise.
        root_length: float32 ``[chunks, key_blocks, 1]`` square root of each key block's tokens, 1 past the context.
    """

    band_page: torch.Tensor
    last_page: torch.Tensor
    budget_pages: torch.Tensor
    candidate_pages: torch.Tensor
    first_key_block: torch.Tensor
    last_key_block: torch.Tensor
    root_length: torch.Tensor


@dataclass(frozen=True, config=KNOBS)
class Dhsa(PrefillMethod):
    """Score key blocks by their mean key or a bound, give the scores to their tokens, keep the best up to a budget.

    The budget of a query block is `budget_tokens`, or `density` of the tokens that it can reach where `budget_tokens`
    is 0; it counts the forced tokens and is rounded up to pages. Forced are the first `sink_tokens` and all tokens from
    `recent_tokens` before the query block to its last token. Query blocks that hold one of the prompt's last
    `dense_tail_tokens` tokens read everything, and so do those whose whole past fits the budget.

    A key block's mean hides a single strong key in it. Its bound does not: the largest product with the mean query that
    the least and the largest number of each channel allow. But where channels vary much, bounds rank key blocks by
    their noise. `bound_weight` goes from the mean's score at 0 to the bound's at 1.

    With `candidate_factor` above 1 the scores choose only candidates, that many times the budget, for all query heads
    of a KV head together. Among these the budget is filled by attention mass: softmax probabilities over the
    candidates, summed over 16 evenly spread queries of the query block, where each quarter of a page counts by its
    largest product. Heads that share scores share the sum of their masses. A list ends before its budget where it holds
    `coverage` of this mass. Where two thirds of the pages or more are candidates, as by default, all are and there is
    no first stage; then key blocks say only what is forced. The second stage is not the paper's. It is the default,
    because on a real checkpoint lists that end by coverage kept the answers at a density of 0.21, where lists of a
    fixed density lost some at 0.25, and the first stage alone more at 0.32 (docs/methods.md).

    ``key_blocks="page"`` cuts the keys every `key_block_tokens`, as the paper's second version does; ``"adaptive"``
    cuts them where they change most, as the first version's trained predictor would (`boundary_threshold` is its
    knob, `key_block_tokens` the other's). A key block competes once it lies wholly in a query block's past and its end
    is decided; until then it is forced. So later tokens change no choice, and the choice is the same for every chunking
    whose prompt chunks start at multiples of `query_block_tokens`, up to rounding of the scores.

    The paper's form is ``bound_weight=0`` and ``candidate_factor=1``; adaptive key blocks have no bounds and want the
    former. The paper's first version has one list for all heads of a layer: ``scores_per="layer"``, which scores mean
    queries of all heads against mean keys of all heads. With tensor parallelism these are the heads of one rank, and so
    are those that adaptive boundaries look at. Lists shared over layers are not offered.
    """

    name: ClassVar[str] = "dhsa"
    page_tokens: ClassVar[int] = PAGE_TOKENS
    former_names: ClassVar[dict[str, str]] = {
        "budget": "budget_tokens",
        "chunks": "key_blocks",
        "chunk": "key_block_tokens",
        "sink": "sink_tokens",
        "local": "recent_tokens",
        "dense_tail": "dense_tail_tokens",
        "heads": "scores_per",
        "query_block": "query_block_tokens",
        "rows": "list_per",
    }

    key_blocks: Annotated[
        Literal["page", "adaptive"], Field(description="cut keys at fixed lengths, or where they change"), COMPILES
    ] = "page"
    key_block_tokens: Annotated[
        Literal[16, 32, 64, 128], Field(description="tokens of a key block of fixed length"), COMPILES
    ] = 32
    boundary_threshold: Annotated[
        float, Field(ge=0, le=2, allow_inf_nan=False, description="least 1 - cosine of the keys around a boundary")
    ] = 0.1
    bound_weight: Annotated[
        float,
        Field(ge=0, le=1, allow_inf_nan=False, description="score of a key block: its mean key's (0) to its bound (1)"),
    ] = 0.5
    candidate_factor: Annotated[
        float,
        Field(ge=1, le=16, allow_inf_nan=False, description="pages whose mass is computed, in budgets; 1: none"),
    ] = 3.0
    coverage: Annotated[
        Coverage | None,
        Field(
            description="share of the candidates' attention at which a list ends before its budget; 1: none does; by "
            f"default {DEFAULT_COVERAGE}, and 1 with budget_tokens, without a second stage or where everything is read"
        ),
    ] = None
    density: Annotated[
        float,
        Field(
            gt=0, le=1, allow_inf_nan=False, description="share of the tokens in reach that a query block reads at most"
        ),
    ] = 0.5
    budget_tokens: Annotated[
        int,
        Field(ge=0, le=UNBOUNDED_TOKENS, description="tokens that a query block reads, in place of density; 0: off"),
        LIMITED_BUDGET,
    ] = 0
    sink_tokens: SinkTokens = 128
    recent_tokens: Annotated[
        int, Field(ge=0, le=1 << 16, description="tokens before a query block, always read"), LIMITED_BUDGET
    ] = 128
    dense_tail_tokens: Annotated[
        int,
        Field(ge=0, le=1 << 16, description="last tokens of the prompt, whose query blocks read everything"),
        LIMITED_BUDGET,
    ] = 64
    scores_per: ScoresPer = "query_head"
    dense_layers: DenseLayers = 0
    query_block_tokens: QueryBlockTokens = 128
    list_per: ListPer = "query_head"

    def __post_init__(self) -> None:
        if self.bound_weight and self.key_blocks == "adaptive":
            raise KnobError(
                "bound_weight",
                self.bound_weight,
                "adaptive key blocks are scored by their mean key; set it to 0, or key_blocks to page",
            )
        if self.covered < 1 and self.candidate_factor == 1:
            raise KnobError(
                "coverage",
                self.coverage,
                "without a second stage no attention is known; set it to 1, or candidate_factor above 1",
            )

    @property
    def weighs_masses(self) -> bool:
        return self.candidate_factor > 1

    @property
    def covered(self) -> float:
        """Share of the candidates' attention at which lists end; 1: they do not."""
        if self.coverage is not None:
            return self.coverage
        fixed = self.budget_tokens > 0 or self.density >= 1
        return 1.0 if fixed or self.candidate_factor == 1 else DEFAULT_COVERAGE

    @property
    def exactly_dense(self) -> bool:
        takes_everything = self.budget_tokens == UNBOUNDED_TOKENS or (self.budget_tokens == 0 and self.density >= 1)
        return takes_everything and self.covered == 1

    def selection_bytes(self, query_tokens: int, seq_len: int, query_heads: int, kv_heads: int) -> int:
        lists = super().selection_bytes(query_tokens, seq_len, query_heads, kv_heads)
        if self.candidate_factor == 1:
            return lists
        blocks, pages = -(-query_tokens // self.query_block_tokens), -(-seq_len // PAGE_TOKENS)
        if self.weighs_all_pages:
            return lists + sampled_scratch_bytes(blocks, pages, PAGE_TOKENS, query_heads, kv_heads)
        candidates = kv_heads * blocks * pages * PAGE_ENTRY_BYTES
        return lists + candidates + scratch_bytes(blocks, pages, query_heads, kv_heads)

    @classmethod
    def measured(cls) -> Dhsa:
        return cls(bound_weight=0.0, candidate_factor=1.0)

    @property
    def weighs_all_pages(self) -> bool:
        """All pages in reach are candidates: as many as the knobs say, or so many that lists would cost more."""
        candidates = self.density * self.candidate_factor
        return self.budget_tokens == 0 and self.weighs_masses and candidates >= LEAST_TO_WEIGH_ALL

    def forms(self) -> Sequence[Dhsa]:
        """With two stages it has one without lists of candidates and one with them, whose lists end by coverage too."""
        if not self.weighs_masses:
            return (self,)
        candidates = LEAST_TO_WEIGH_ALL / 2 if self.weighs_all_pages else 1.0
        coverage = min(self.covered, DEFAULT_COVERAGE)
        return self, replace(self, budget_tokens=0, density=candidates / self.candidate_factor, coverage=coverage)

    def selection_work(self, seq_len: int, query_heads: int, kv_heads: int) -> float:
        if self.weighs_all_pages:
            return ALL_MASSES_WORK * query_heads / self.query_block_tokens
        first_stage = super().selection_work(seq_len, query_heads, kv_heads)
        if self.candidate_factor == 1:
            return first_stage
        budget = self.budget_tokens / seq_len if self.budget_tokens else self.density
        listed = min(self.candidate_factor * budget, 1.0)
        return first_stage + LISTED_MASSES_WORK * listed * query_heads / self.query_block_tokens

    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        block, reach = self.query_block_tokens, mean_reach(query_tokens, seq_len)
        budget = self.budget_tokens or self.density * reach
        if self.covered < 1:
            measured = DENSITY_AT_ALL_LEFT_OUT - DENSITY_BY_LEFT_OUT * math.log(1 - self.covered)
            budget = min(budget, density_at(reach, max(measured, 0.0), DENSITY_BY_REACH) * reach)
        kept = max(budget, self.sink_tokens + self.recent_tokens + block)
        tail = -(-self.dense_tail_tokens // block) * block
        return tokens_with_dense_tail(kept, tail, query_tokens, seq_len)

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        context, query_heads = keys.seq_len, query.shape[1]
        first_query, last_query = query_blocks(query.shape[0], context, self.query_block_tokens, query.device)
        budget_pages = self.budget_pages(last_query)
        key_chunks = self.key_chunks(keys)
        band_start = self.band_start(key_chunks, first_query, last_query, layer.prompt_tokens or context)
        score_heads = heads_with_scores(self.scores_per, query_heads, keys.num_kv_heads)
        selection = PageSelection(
            self.query_block_tokens,
            PAGE_TOKENS,
            min(score_heads, keys.num_kv_heads) if self.weighs_masses else score_heads,
            self.sink_tokens,
        )
        if self.weighs_all_pages:
            mass = sampled_mass(query, keys, scale, self.query_block_tokens, PAGE_TOKENS)
        else:
            scores = page_scores(query, key_chunks, context, selection)
            if not self.weighs_masses:
                return best_pages(scores, band_start, last_query, budget_pages, selection)
            candidate_pages = (budget_pages.double() * self.candidate_factor).ceil()
            mask = best_pages(scores, band_start, last_query, candidate_pages, selection)
            grid = ListGrid(
                query.shape[0], context, self.query_block_tokens, PAGE_TOKENS, PAGE_TOKENS, selection.score_heads
            )
            mass = candidate_mass(query, keys, scale, self.query_block_tokens, block_lists(mask, grid))
        if score_heads < query_heads:
            mass = mass.view(score_heads, -1, *mass.shape[1:]).sum(1)
        covered = self._covered_mass(query_heads // mass.shape[0])
        return best_pages(mass, band_start, last_query, budget_pages, selection, covered)

    def prepare(self, blocks: PromptBlocks, prompt_tokens: Sequence[int | None]) -> PreparedChunks | None:
        """As `block_mask` works it out for one chunk, on the host, since key blocks of fixed length are known there."""
        if self.key_blocks == "adaptive":
            return None
        length = self.key_block_tokens
        first_query, last_query = blocks.positions.astype(np.int64)
        if self.budget_tokens:
            budget_pages = np.full_like(last_query, -(-self.budget_tokens // PAGE_TOKENS))
        else:
            # In float64 `density` of what is in reach is not rounded up to a token more than that.
            budget_pages = np.ceil((last_query + 1) * self.density / PAGE_TOKENS)
        candidate_pages = np.ceil(budget_pages * self.candidate_factor)
        # A key block that the query block's last token does not end is forced.
        band = np.minimum(np.maximum(first_query - self.recent_tokens, 0), (last_query + 1) // length * length)
        ends = [tokens or span.seq_len for tokens, span in zip(prompt_tokens, blocks.spans, strict=True)]
        prompt_end = np.repeat(ends, np.diff(blocks.starts))
        # Query blocks after the prompt's end, of outputs that are computed again, count as its end.
        band[np.minimum(last_query, prompt_end - 1) >= prompt_end - self.dense_tail_tokens] = 0
        seq_len = np.array([span.seq_len for span in blocks.spans])[:, None]
        page_start = np.arange(0, blocks.longest_seq_len, PAGE_TOKENS)
        page_end = np.minimum(page_start + PAGE_TOKENS, seq_len) - 1
        in_context = page_start < seq_len
        first_key_block = np.where(in_context, page_start // length, 1)
        last_key_block = np.where(in_context, page_end // length, 0)
        key_block_start = np.arange(0, blocks.longest_seq_len, length)
        lengths = np.clip(seq_len - key_block_start, 1, length)
        of_context = in_context.shape
        band_page, last_page, budget, candidates, first, last, tokens = int_tables(
            (
                band // PAGE_TOKENS,
                last_query // PAGE_TOKENS,
                np.minimum(budget_pages, UNBOUNDED_TOKENS),
                np.minimum(candidate_pages, UNBOUNDED_TOKENS),
                first_key_block.ravel(),
                last_key_block.ravel(),
                lengths.ravel(),
            ),
            blocks.chunk.device,
        )
        root_length = tokens.view(*lengths.shape, 1).sqrt()
        return PreparedChunks(
            band_page, last_page, budget, candidates, first.view(of_context), last.view(of_context), root_length
        )

    def select_chunks(self, chunks: PromptChunks, layers: Sequence[Layer], prepared: Any, lists: PageList) -> None:
        if prepared is None:
            super().select_chunks(chunks, layers, prepared, lists)
            return
        blocks, query_heads, kv_heads = chunks.blocks, chunks.query.shape[1], chunks.keys[0].num_kv_heads
        score_heads = heads_with_scores(self.scores_per, query_heads, kv_heads)
        if self.weighs_masses:
            mass = self._masses(chunks, prepared, min(score_heads, kv_heads))
            if score_heads < query_heads:
                mass = mass.view(score_heads, -1, *mass.shape[1:]).sum(1)
            covered = self._covered_mass(query_heads // mass.shape[0])
            mask = self._best(mass, prepared, prepared.budget_pages, covered)
        else:
            mask = self._best(self._scores(chunks, prepared, score_heads), prepared, prepared.budget_pages)
        list_heads = lists.kept_tokens.shape[0] // blocks.blocks
        write_lists(shared(mask, list_heads), blocks, PAGE_TOKENS, list_heads, lists)

    def _masses(self, chunks: PromptChunks, prepared: PreparedChunks, score_heads: int) -> torch.Tensor:
        """Of the candidates: ``[query_heads, blocks, pages]``, 0 or less for other pages."""
        if self.weighs_all_pages:
            return chunk_sampled_mass(chunks, PAGE_TOKENS)
        mask = self._best(self._scores(chunks, prepared, score_heads), prepared, prepared.candidate_pages)
        candidates = empty_lists(score_heads * chunks.blocks.blocks, mask.shape[2], PAGE_TOKENS, mask.device)
        write_lists(mask, chunks.blocks, PAGE_TOKENS, score_heads, candidates)
        return chunk_mass(chunks, candidates)

    def _scores(self, chunks: PromptChunks, prepared: PreparedChunks, score_heads: int) -> torch.Tensor:
        """Of the first stage: ``[score_heads, blocks, pages]``."""
        representation = self._representation(chunks, prepared)
        first, last = prepared.first_key_block, prepared.last_key_block
        return chunk_page_scores(chunks.query, representation, first, last, chunks.blocks, score_heads)

    def _best(
        self, scores: torch.Tensor, prepared: PreparedChunks, pages: torch.Tensor, covered_mass: float | None = None
    ) -> torch.Tensor:
        """The forced pages and those of the highest scores, so many of each query block: bool, as the scores."""
        sink_pages = -(-self.sink_tokens // PAGE_TOKENS)
        return select_pages(scores, sink_pages, prepared.band_page, prepared.last_page, pages, covered_mass)

    def _covered_mass(self, heads: int) -> float | None:
        """Mass of its pages, summed over so many query heads, at which a list ends; None: at its budget."""
        return None if self.covered == 1 else self.covered * SAMPLED_QUERIES * heads

    def _representation(self, chunks: PromptChunks, prepared: PreparedChunks) -> torch.Tensor:
        """What stands for the key blocks of each chunk, ``[kv_heads, chunks, key_blocks, ...]`` as in `KeyBlocks`."""
        mean = chunk_summaries(chunks, SummaryKind(self.key_block_tokens, "mean"))
        if self.bound_weight:
            bounds = chunk_summaries(chunks, SummaryKind(self.key_block_tokens, "bounds"))
            return torch.cat((mean, mean), dim=3).lerp(bounds, self.bound_weight)
        return mean * prepared.root_length

    def budget_pages(self, last_query: torch.Tensor) -> torch.Tensor:
        """Pages that each query block may keep, forced ones included: int64, of the shape of `last_query`."""
        if self.budget_tokens:
            return torch.full_like(last_query, -(-self.budget_tokens // PAGE_TOKENS))
        # In float64 `density` of what is in reach is not rounded up to a token more than that.
        return ((last_query + 1).double() * self.density / PAGE_TOKENS).ceil().long()

    def band_start(
        self, key_chunks: KeyBlocks, first_query: torch.Tensor, last_query: torch.Tensor, prompt_tokens: int
    ) -> torch.Tensor:
        """Position from which on each query block reads everything: int64, of the shape of `first_query`."""
        decided = (last_query + 1 - key_chunks.look_ahead_tokens).clamp(min=0)
        open_chunk = torch.searchsorted(key_chunks.start, decided, right=True) - 1
        band = torch.minimum((first_query - self.recent_tokens).clamp(min=0), key_chunks.start[open_chunk])
        # Query blocks after the prompt's end, of outputs that are computed again, count as its end.
        last_of_prompt = last_query.clamp(max=prompt_tokens - 1)
        return band.masked_fill(last_of_prompt >= prompt_tokens - self.dense_tail_tokens, 0)

    def key_chunks(self, keys: PagedKeys) -> KeyBlocks:
        """The context's keys in key blocks, as the knobs say."""
        if self.key_blocks == "adaptive":
            return adaptive_blocks(keys, self.boundary_threshold)
        block_tokens = self.key_block_tokens
        mean = page_summaries(keys, SummaryKind(block_tokens, "mean"))
        start = torch.arange(0, (mean.shape[1] + 1) * block_tokens, block_tokens, device=mean.device)
        if self.bound_weight:
            bounds = page_summaries(keys, SummaryKind(block_tokens, "bounds"))
            return KeyBlocks(torch.cat((mean, mean), dim=2).lerp(bounds, self.bound_weight), start, 0)
        length = (keys.seq_len - start[:-1]).clamp(max=block_tokens)
        return KeyBlocks(mean * length.sqrt().unsqueeze(1), start, 0)
