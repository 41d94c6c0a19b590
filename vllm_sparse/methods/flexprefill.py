"""FlexPrefill (arXiv 2502.20766, ICLR 2025): per head, as many key blocks as a target share of attention needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.block_scores import chunk_page_scores
from vllm_sparse.kernels.coverage import chunk_coverage, coverage_mask
from vllm_sparse.kernels.coverage.reference import top_mask
from vllm_sparse.kernels.flex_estimate import (
    FlexEstimate,
    Samples,
    flex_estimate,
    last_queries,
    scratch_bytes,
    token_profiles,
)
from vllm_sparse.kernels.flex_lines import line_map
from vllm_sparse.kernels.flex_lines.reference import with_forced
from vllm_sparse.kernels.flex_pattern import pooled_attention, pooled_distance
from vllm_sparse.kernels.page_list import write_lists
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.knobs import KNOBS, LIMITED_BUDGET, DenseLayers, KnobError, ListPer, QueryBlockTokens
from vllm_sparse.methods.prefill import Layer, PrefillMethod, density_at, mean_reach, shared
from vllm_sparse.pages import PageList
from vllm_sparse.step.chunks import PromptBlocks, PromptChunks, chunk_alone

BLOCK_TOKENS = 128
# Density at 8K, where 4096 keys are in reach on average, was 0.42 at gamma 0.9, 0.50 at 0.95 and 0.61 at 0.98; at 32K
# it was 0.27, 0.35 and 0.46, means over chunks (Qwen2.5-Coder-0.5B, docs/methods.md): about 1 - (1 - gamma) ** 0.24,
# falling by this power of the keys in reach.
DENSITY_EXPONENT, DENSITY_BY_REACH = 0.24, 0.33
# Fewer tokens between samples would cost more than a quarter of the dense products of queries and keys.
LEAST_SAMPLE_EVERY_TOKENS = 512
# Of the chunks whose choice was timed, each with one sample (`vllm_sparse.step.gpu_table`).
MEASURED_CHUNK_TOKENS = 8192
# Of a sample and a key block: masses of a column and of a band in float32.
LINE_BYTES = 8


@dataclass(frozen=True, config=KNOBS)
class FlexPrefill(PrefillMethod):
    """Sample the last 128 queries of the chunk; keep the columns and diagonals that hold a share `gamma` of them.

    A head whose sampled attention is close to a guess from pooled queries and keys (Jensen-Shannon distance below
    `divergence_threshold`) takes its blocks from the pooled map, beside lines of `min_budget_tokens`. The first block
    and the diagonal are always kept.

    Strict by default: blocks are taken by cumulative *block* mass until it reaches `gamma`, every block that a
    diagonal band touches is kept, and the block that crosses the target is included, so the coverage holds on the
    sample. `faithful` reproduces the official code's counts, which do not guarantee it.

    This project's addition: with `sample_every_tokens` a chunk is cut at multiples of it. Each stretch samples its own
    last queries, whose lines and pooled map serve its query blocks alone.
    """

    name: ClassVar[str] = "flexprefill"
    page_tokens: ClassVar[int] = BLOCK_TOKENS
    former_names: ClassVar[dict[str, str]] = {
        "tau": "divergence_threshold",
        "min_budget": "min_budget_tokens",
        "max_budget": "max_budget_tokens",
        "query_block": "query_block_tokens",
        "rows": "list_per",
    }

    gamma: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description="share of attention to cover")] = 0.9
    divergence_threshold: Annotated[
        float, Field(ge=0, le=1, allow_inf_nan=False, description="distance below which the pooled map is trusted")
    ] = 0.1
    min_budget_tokens: Annotated[
        int, Field(ge=0, le=1 << 24, description="least tokens of columns and of diagonals"), LIMITED_BUDGET
    ] = 1024
    max_budget_tokens: Annotated[
        int, Field(ge=128, le=1 << 24, description="most tokens of columns and of diagonals"), LIMITED_BUDGET
    ] = 1 << 24
    dense_layers: DenseLayers = 0
    query_block_tokens: QueryBlockTokens = 128
    list_per: ListPer = "query_head"
    faithful: Annotated[bool, Field(description="count blocks as the official code does")] = False
    sample_every_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=1 << 24,
            multiple_of=BLOCK_TOKENS,
            description="cut each chunk at positions that are multiples of so many tokens, at least "
            f"{LEAST_SAMPLE_EVERY_TOKENS}; each stretch has a sample and lines of its own; 0: one sample a chunk",
        ),
    ] = 0

    def __post_init__(self) -> None:
        if self.max_budget_tokens < self.min_budget_tokens:
            raise KnobError(
                "max_budget_tokens",
                self.max_budget_tokens,
                f"it is below min_budget_tokens {self.min_budget_tokens}; raise it or lower that",
            )
        if 0 < self.sample_every_tokens < LEAST_SAMPLE_EVERY_TOKENS:
            raise KnobError(
                "sample_every_tokens",
                self.sample_every_tokens,
                f"samples so close cost more than they save; set it to {LEAST_SAMPLE_EVERY_TOKENS} or more, or to 0",
            )
        if self.sample_every_tokens and self.faithful:
            raise KnobError(
                "sample_every_tokens",
                self.sample_every_tokens,
                "the official code, which faithful reproduces, has one sample; set it to 0, or faithful to false",
            )

    @property
    def weighs_masses(self) -> bool:
        return True

    @property
    def exactly_dense(self) -> bool:
        return self.gamma >= 1 and self.max_budget_tokens == 1 << 24

    def read_tokens(self, query_tokens: int, seq_len: int) -> float:
        reach = mean_reach(query_tokens, seq_len)
        # Columns and diagonals.
        least, most = 2 * self.min_budget_tokens, 2 * self.max_budget_tokens
        density: float = 1 - (1 - self.gamma) ** DENSITY_EXPONENT
        if self.gamma < 1:
            density = density_at(reach, density, DENSITY_BY_REACH)
        return min(max(density * reach, least), most, reach)

    def selection_bytes(self, query_tokens: int, seq_len: int, query_heads: int, kv_heads: int) -> int:
        lists = super().selection_bytes(query_tokens, seq_len, query_heads, kv_heads)
        key_blocks = -(-seq_len // BLOCK_TOKENS)
        # A request may ask for several samples where the server's own knobs ask for one. A chunk of the least length
        # may reach into two stretches, and longer ones do not make more stretches of as many queries.
        samples = 2 * self.most_chunks(query_tokens)
        lines = samples * query_heads * key_blocks * LINE_BYTES
        # The sample's memory is free again before there are lists.
        return max(lists, scratch_bytes(samples, key_blocks, query_heads, BLOCK_TOKENS)) + lines

    def selection_work(self, seq_len: int, query_heads: int, kv_heads: int) -> float:
        lists = super().selection_work(seq_len, query_heads, kv_heads)
        if not self.sample_every_tokens:
            return lists
        # As if a sample were all that was timed: an upper bound until choosing with several is timed.
        more_samples = max(MEASURED_CHUNK_TOKENS / self.sample_every_tokens - 1, 0.0)
        return lists + more_samples * query_heads / BLOCK_TOKENS

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        chunk = chunk_alone(query, keys, scale, self.query_block_tokens)
        return self._map(chunk, self._samples(chunk.blocks))

    def prepare(self, blocks: PromptBlocks, prompt_tokens: Sequence[int | None]) -> Samples:
        return self._samples(blocks)

    def select_chunks(self, chunks: PromptChunks, layers: Sequence[Layer], prepared: Any, lists: PageList) -> None:
        if self.faithful:
            # Its counts per token are taken of one context at a time.
            super().select_chunks(chunks, layers, prepared, lists)
            return
        list_heads = lists.kept_tokens.shape[0] // chunks.blocks.blocks
        mask = shared(self._map(chunks, prepared), list_heads)
        write_lists(mask, chunks.blocks, BLOCK_TOKENS, list_heads, lists)

    def _samples(self, blocks: PromptBlocks) -> Samples:
        return last_queries(blocks, BLOCK_TOKENS, self.sample_every_tokens)

    def _map(self, chunks: PromptChunks, samples: Samples) -> torch.Tensor:
        """Key blocks that each query block reads: bool ``[heads, blocks, key_blocks]``; of one chunk if `faithful`."""
        heads, head_size = chunks.query.shape[1:]
        if self.exactly_dense:
            shape = heads, chunks.blocks.blocks, samples.key_blocks
            return torch.ones(shape, dtype=torch.bool, device=chunks.query.device)
        if self.faithful:
            # The official code samples with this scale, whatever the model's.
            chunks = replace(chunks, scale=head_size**-0.5)
        estimate = flex_estimate(chunks, samples)
        distance = pooled_distance(
            self._pooled_scores(chunks, samples.of_chunks, estimate, samples),
            estimate.column_mass,
            samples.queries,
            BLOCK_TOKENS,
            chunks.scale,
            guard_zeros=not self.faithful,
        )
        query_aware = distance < self.divergence_threshold
        pooled: torch.Tensor | None = None
        # Few heads want the pooled map. On a GPU asking whether any does would wait for the device.
        if self.divergence_threshold > 0 and (query_aware.is_cuda or bool(query_aware.any())):
            pooled = self._pooled_map(chunks, estimate, samples, query_aware)
        if self.faithful:
            return self._faithful_map(chunks, estimate, query_aware.squeeze(1), pooled)
        # The pooled map's cut is global and may leave a query block next to nothing, not even its neighbours; as in
        # the official code its heads keep the least budget of lines.
        gamma = (~query_aware * self.gamma).flatten()
        low, high = self._budget_blocks
        lines = coverage_mask(estimate.line_mass.flatten(0, 2), gamma.repeat(2), low, high)
        columns, bands = lines.view(estimate.line_mass.shape)
        return line_map(columns, bands, pooled, samples.served, BLOCK_TOKENS)

    @property
    def _budget_blocks(self) -> tuple[int, int]:
        """Fewest and most blocks of columns, and of bands."""
        return max(-(-self.min_budget_tokens // BLOCK_TOKENS), 1), max(-(-self.max_budget_tokens // BLOCK_TOKENS), 1)

    def _faithful_map(
        self, chunk: PromptChunks, estimate: FlexEstimate, query_aware: torch.Tensor, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        """Line counts from token profiles and one block a band, as the official code takes them; of one chunk."""
        (keys,) = chunk.keys
        profiles = token_profiles(chunk.query[-BLOCK_TOKENS:], keys, chunk.scale)
        column_mass = estimate.column_mass.squeeze(1)
        blocks = column_mass.shape[1]
        # The official code pools the distance profile from its far end.
        far_first = torch.nn.functional.pad(profiles.distance.flip(1), (0, blocks * BLOCK_TOKENS - keys.seq_len))
        band_mass = far_first.view(-1, blocks, BLOCK_TOKENS).sum(2).flip(1)
        low, high = self._budget_blocks

        def blocks_for(profile: torch.Tensor) -> torch.Tensor:
            ordered = profile.sort(dim=1, descending=True).values
            tokens = (ordered.cumsum(1) <= self.gamma).sum(1) + 1
            counts = (tokens // BLOCK_TOKENS + 1).clamp(min=low, max=high)
            return torch.where(query_aware, low, counts)

        columns = top_mask(column_mass, blocks_for(profiles.column))
        bands = top_mask(band_mass, blocks_for(profiles.distance))
        first_query, last_query = chunk.blocks.first_query, chunk.blocks.last_query
        offset = (last_query // BLOCK_TOKENS).unsqueeze(1) - torch.arange(blocks, device=last_query.device)
        chosen = columns.unsqueeze(1) | bands[:, offset.clamp(min=0)] & (offset >= 0)
        return with_forced(chosen if pooled is None else chosen | pooled, first_query, last_query, BLOCK_TOKENS)

    def _pooled_scores(
        self, chunks: PromptChunks, blocks: PromptBlocks, estimate: FlexEstimate, samples: Samples
    ) -> torch.Tensor:
        """Products of pooled queries and mean keys: float32 ``[heads, blocks, key_blocks]``."""
        edges = samples.first_key_block, samples.last_key_block
        return chunk_page_scores(chunks.query, estimate.key_block_mean, *edges, blocks, chunks.query.shape[1])

    def _pooled_map(
        self, chunks: PromptChunks, estimate: FlexEstimate, samples: Samples, query_aware: torch.Tensor
    ) -> torch.Tensor:
        """The shortest prefix of all of a stretch's block pairs that covers `gamma` of the pooled map (section 3.3).

        Bool ``[heads, blocks, key_blocks]``; nothing for heads that are not query-aware in a stretch.
        """
        scores = self._pooled_scores(chunks, chunks.blocks, estimate, samples)
        weight = pooled_attention(scores, samples.served, BLOCK_TOKENS, chunks.scale)
        if self.faithful:
            ordered, order = weight.flatten(1).sort(dim=1, descending=True, stable=True)
            keep = (ordered.cumsum(1) <= self.gamma) & query_aware
            return torch.zeros_like(keep).scatter_(1, order, keep).view_as(weight)
        return chunk_coverage(weight, query_aware * self.gamma, samples.served)
