"""FlexPrefill (arXiv 2502.20766, ICLR 2025): per head, as many key blocks as a target share of attention needs."""

from __future__ import annotations

import functools
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.block_scores import pooled_queries
from vllm_sparse.kernels.coverage import coverage_mask
from vllm_sparse.kernels.coverage.reference import top_mask
from vllm_sparse.kernels.flex_estimate import FlexEstimate, flex_estimate, token_profiles
from vllm_sparse.kernels.flex_lines import BlockGrid, line_map
from vllm_sparse.kernels.flex_lines.reference import with_forced
from vllm_sparse.kernels.flex_pattern import pooled_distance
from vllm_sparse.kernels.page_list import query_blocks
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.knobs import KNOBS, LIMITED_BUDGET, DenseLayers, KnobError, ListPer, QueryBlockTokens
from vllm_sparse.methods.prefill import Layer, PrefillMethod, density_at, mean_reach

BLOCK_TOKENS = 128
# Density at 8K, where 4096 keys are in reach on average, was 0.42 at gamma 0.9, 0.50 at 0.95 and 0.61 at 0.98; at 32K
# it was 0.27, 0.35 and 0.46, means over chunks (Qwen2.5-Coder-0.5B, docs/methods.md): about 1 - (1 - gamma) ** 0.24,
# falling by this power of the keys in reach.
DENSITY_EXPONENT, DENSITY_BY_REACH = 0.24, 0.33


@dataclass(frozen=True, config=KNOBS)
class FlexPrefill(PrefillMethod):
    """Sample the last 128 queries of the chunk; keep the columns and diagonals that hold a share `gamma` of them.

    A head whose sampled attention is close to a guess from pooled queries and keys (Jensen-Shannon distance below
    `divergence_threshold`) takes its blocks from the pooled map, beside lines of `min_budget_tokens`. The first block
    and the diagonal are always kept.

    Strict by default: blocks are taken by cumulative *block* mass until it reaches `gamma`, every block that a
    diagonal band touches is kept, and the block that crosses the target is included, so the coverage holds on the
    sample. `faithful` reproduces the official code's counts, which do not guarantee it.
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

    def __post_init__(self) -> None:
        if self.max_budget_tokens < self.min_budget_tokens:
            raise KnobError(
                "max_budget_tokens",
                self.max_budget_tokens,
                f"it is below min_budget_tokens {self.min_budget_tokens}; raise it or lower that",
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

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float, layer: Layer) -> torch.Tensor:
        chunk, heads, head_size = query.shape
        context = keys.seq_len
        future = future_blocks(chunk, context, self.query_block_tokens, query.device)
        if self.exactly_dense:
            return ~future.expand(heads, -1, -1)

        # The official code samples with 1/sqrt(head_size), whatever the model's scale.
        sample_scale = head_size**-0.5 if self.faithful else scale
        sample = query[-BLOCK_TOKENS:]
        estimate = flex_estimate(sample, keys, sample_scale, BLOCK_TOKENS)
        distance = pooled_distance(
            sample, estimate.key_block_mean, estimate.column_mass, sample_scale, guard_zeros=not self.faithful
        )
        query_aware = distance < self.divergence_threshold
        pooled: torch.Tensor | None = None
        # Few heads want the pooled map. On a GPU asking whether any does would wait for the device.
        if self.divergence_threshold > 0 and (query.is_cuda or bool(query_aware.any())):
            pooled = self._pooled_map(query, estimate, future, query_aware, sample_scale)
        if self.faithful:
            return self._faithful_map(query, keys, sample_scale, estimate, query_aware, pooled)
        # The pooled map's cut is global and may leave a query block next to nothing, not even its neighbours; as in
        # the official code its heads keep the least budget of lines.
        gamma = ~query_aware * self.gamma
        low, high = self._budget_blocks
        lines = coverage_mask(estimate.line_mass.flatten(0, 1), gamma.repeat(2), low, high)
        columns, bands = lines.view(2, heads, -1)
        return line_map(columns, bands, pooled, BlockGrid(chunk, context, self.query_block_tokens, BLOCK_TOKENS))

    @property
    def _budget_blocks(self) -> tuple[int, int]:
        """Fewest and most blocks of columns, and of bands."""
        return max(-(-self.min_budget_tokens // BLOCK_TOKENS), 1), max(-(-self.max_budget_tokens // BLOCK_TOKENS), 1)

    def _faithful_map(
        self,
        query: torch.Tensor,
        keys: PagedKeys,
        scale: float,
        estimate: FlexEstimate,
        query_aware: torch.Tensor,
        pooled: torch.Tensor | None,
    ) -> torch.Tensor:
        """Line counts from token profiles and one block a band, as the official code takes them."""
        profiles = token_profiles(query[-BLOCK_TOKENS:], keys, scale)
        context = keys.seq_len
        blocks = estimate.column_mass.shape[1]
        # The official code pools the distance profile from its far end.
        far_first = torch.nn.functional.pad(profiles.distance.flip(1), (0, blocks * BLOCK_TOKENS - context))
        band_mass = far_first.view(-1, blocks, BLOCK_TOKENS).sum(2).flip(1)
        low, high = self._budget_blocks

        def blocks_for(profile: torch.Tensor) -> torch.Tensor:
            ordered = profile.sort(dim=1, descending=True).values
            tokens = (ordered.cumsum(1) <= self.gamma).sum(1) + 1
            counts = (tokens // BLOCK_TOKENS + 1).clamp(min=low, max=high)
            return torch.where(query_aware, low, counts)

        columns = top_mask(estimate.column_mass, blocks_for(profiles.column))
        bands = top_mask(band_mass, blocks_for(profiles.distance))
        first_query, last_query = query_blocks(query.shape[0], context, self.query_block_tokens, query.device)
        offset = (last_query // BLOCK_TOKENS).unsqueeze(1) - torch.arange(blocks, device=query.device)
        chosen = columns.unsqueeze(1) | bands[:, offset.clamp(min=0)] & (offset >= 0)
        return with_forced(chosen if pooled is None else chosen | pooled, first_query, last_query, BLOCK_TOKENS)

    def _pooled_map(
        self,
        query: torch.Tensor,
        estimate: FlexEstimate,
        future: torch.Tensor,
        query_aware: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The shortest prefix of all block pairs that covers `gamma` of the pooled map (section 3.3).

        Bool ``[heads, query_blocks, key_blocks]``; nothing for heads that are not query-aware.
        """
        chunk, heads, head_size = query.shape
        means = estimate.key_block_mean
        blocks = future.shape[0]
        pooled = pooled_queries(query, self.query_block_tokens)
        # Means, where DHSA wants them scaled by the square root of their length.
        pooled[:, :-1].div_(self.query_block_tokens**0.5)
        pooled[:, -1].div_((chunk - (blocks - 1) * self.query_block_tokens) ** 0.5)
        pooled = pooled.view(means.shape[0], -1, head_size)
        logits = torch.matmul(pooled, means.transpose(1, 2)).mul(scale).view(heads, blocks, -1)
        weight = logits.masked_fill(future, float("-inf")).softmax(-1).flatten(1) / blocks
        if self.faithful:
            ordered, order = weight.sort(dim=1, descending=True, stable=True)
            keep = (ordered.cumsum(1) <= self.gamma) & query_aware.unsqueeze(1)
            return torch.zeros_like(keep).scatter_(1, order, keep).view(heads, blocks, -1)
        gamma = query_aware * self.gamma
        return coverage_mask(weight, gamma, 0, weight.shape[1]).view(heads, blocks, -1)


@functools.lru_cache(maxsize=64)
def future_blocks(chunk: int, context: int, query_block_tokens: int, device: torch.device) -> torch.Tensor:
    """Key blocks out of reach of each query block: bool ``[query_blocks, key_blocks]``, the same for all layers."""
    _, last_query = query_blocks(chunk, context, query_block_tokens, device)
    key_block = torch.arange(-(-context // BLOCK_TOKENS), device=device)
    return key_block * BLOCK_TOKENS > last_query.unsqueeze(1)
