"""FlexPrefill (arXiv 2502.20766, ICLR 2025): per head, as many key blocks as a target share of attention needs."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_sparse.kernels.flex_estimate import FlexEstimate, flex_estimate, token_profiles
from vllm_sparse.kernels.page_list import chunk_lists, query_blocks
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.base import KNOBS, DenseLayers, KnobError, Layer, PrefillMethod, QueryBlock, Rows
from vllm_sparse.pages import PageList

BLOCK_TOKENS = 128


@dataclass(frozen=True, config=KNOBS)
class FlexPrefill(PrefillMethod):
    """Sample the last 128 queries of the chunk; keep the columns and diagonals that hold a share `gamma` of them.

    A head whose sampled attention is close to a guess from pooled queries and keys (Jensen-Shannon distance below
    `tau`) takes its blocks from the pooled map, beside `min_budget` tokens of lines. The first block and the diagonal
    are always kept.

    Strict by default: blocks are taken by cumulative *block* mass until it reaches `gamma`, every block that a
    diagonal band touches is kept, and the block that crosses the target is included, so the coverage holds on the
    sample. `faithful` reproduces the official code's counts, which do not guarantee it.
    """

    name: ClassVar[str] = "flexprefill"
    page_tokens: ClassVar[int] = BLOCK_TOKENS

    gamma: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, description="share of attention to cover")] = 0.9
    tau: Annotated[
        float, Field(ge=0, le=1, allow_inf_nan=False, description="distance below which the pooled map is trusted")
    ] = 0.1
    min_budget: Annotated[int, Field(ge=0, le=1 << 24, description="least tokens of columns and of diagonals")] = 1024
    max_budget: Annotated[int, Field(ge=128, le=1 << 24, description="most tokens of columns and of diagonals")] = (
        1 << 24
    )
    dense_layers: DenseLayers = 0
    query_block: QueryBlock = 128
    rows: Rows = "query_head"
    faithful: Annotated[bool, Field(description="count blocks as the official code does")] = False

    def __post_init__(self) -> None:
        if self.max_budget < self.min_budget:
            raise KnobError(
                "max_budget", self.max_budget, f"it is below min_budget {self.min_budget}; raise it or lower that"
            )

    @property
    def exactly_dense(self) -> bool:
        return self.gamma >= 1 and self.max_budget == 1 << 24

    def select(
        self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, layer: Layer
    ) -> PageList:
        return chunk_lists(
            self.block_mask(query, keys, scale),
            BLOCK_TOKENS,
            query.shape[0],
            keys.context_tokens,
            self.query_block,
            page_size_tokens,
            keys.num_kv_heads if self.rows == "kv_head" else query.shape[1],
        )

    def block_mask(self, query: torch.Tensor, keys: PagedKeys, scale: float) -> torch.Tensor:
        """Selected key blocks: bool ``[query_heads, query_blocks, key_blocks]`` on a key grid from token 0."""
        chunk, heads, head_size = query.shape
        context = keys.context_tokens
        key_blocks = -(-context // BLOCK_TOKENS)
        first_query, last_query = query_blocks(chunk, context, self.query_block, query.device)
        key_block = torch.arange(key_blocks, device=query.device)
        causal = key_block * BLOCK_TOKENS <= last_query.unsqueeze(1)
        own = causal & ((key_block + 1) * BLOCK_TOKENS > first_query.unsqueeze(1))
        forced = own | (key_block == 0)
        if self.exactly_dense:
            return causal.expand(heads, -1, -1).clone()

        # The official code samples with 1/sqrt(head_size), whatever the model's scale.
        sample_scale = head_size**-0.5 if self.faithful else scale
        sample = query[-BLOCK_TOKENS:]
        estimate = flex_estimate(sample, keys, sample_scale, BLOCK_TOKENS)
        query_aware = self._is_query_aware(sample, estimate, sample_scale)
        if self.faithful:
            lines = self._faithful_lines(sample, keys, sample_scale, estimate, query_aware, last_query)
        else:
            lines = self._strict_lines(estimate, query_aware, first_query, last_query)
        # One sync a layer: the pooled map is wanted by few heads and costs a sort over all block pairs.
        if self.tau > 0 and bool(query_aware.any()):
            pooled = self._pooled_map(query, estimate, causal, sample_scale)
            lines = lines | (pooled & query_aware.view(-1, 1, 1))
        return (lines | forced) & causal

    def _is_query_aware(self, sample: torch.Tensor, estimate: FlexEstimate, scale: float) -> torch.Tensor:
        """Bool ``[heads]``: the pooled guess is within `tau` of the sampled block masses."""
        means = estimate.key_block_mean
        pooled = sample.float().mean(0).view(means.shape[0], -1, sample.shape[2])
        guess = torch.matmul(pooled, means.transpose(1, 2)).mul(scale).softmax(-1).flatten(0, 1)
        distance = jensen_shannon_distance(guess, estimate.column_mass, guard_zeros=not self.faithful)
        return distance < self.tau

    def _budget_blocks(self, counts: torch.Tensor) -> torch.Tensor:
        low = -(-self.min_budget // BLOCK_TOKENS)
        high = max(-(-self.max_budget // BLOCK_TOKENS), 1)
        return counts.clamp(min=max(low, 1), max=high)

    def _strict_lines(
        self,
        estimate: FlexEstimate,
        query_aware: torch.Tensor,
        first_query: torch.Tensor,
        last_query: torch.Tensor,
    ) -> torch.Tensor:
        """Columns and bands by cumulative block mass: bool ``[heads, query_blocks, key_blocks]``."""

        def lines(mass: torch.Tensor) -> torch.Tensor:
            # The pooled map's cut is global and may leave a query block next to nothing, not even its neighbours; as
            # in the official code its heads keep the least budget of lines.
            counts = torch.where(query_aware, 0, coverage_count(mass, self.gamma))
            return top_mask(mass, self._budget_blocks(counts))

        columns, bands = lines(estimate.column_mass), lines(estimate.band_mass)
        return columns.unsqueeze(1) | _band_blocks(bands, first_query, last_query)

    def _faithful_lines(
        self,
        sample: torch.Tensor,
        keys: PagedKeys,
        scale: float,
        estimate: FlexEstimate,
        query_aware: torch.Tensor,
        last_query: torch.Tensor,
    ) -> torch.Tensor:
        """Line counts from token profiles, as the official code takes them."""
        profiles = token_profiles(sample, keys, scale)
        context = keys.context_tokens
        blocks = estimate.column_mass.shape[1]
        # The official code pools the distance profile from its far end.
        far_first = torch.nn.functional.pad(profiles.distance.flip(1), (0, blocks * BLOCK_TOKENS - context))
        band_mass = far_first.view(-1, blocks, BLOCK_TOKENS).sum(2).flip(1)

        def blocks_for(profile: torch.Tensor) -> torch.Tensor:
            ordered = profile.sort(dim=1, descending=True).values
            tokens = (ordered.cumsum(1) <= self.gamma).sum(1) + 1
            counts = self._budget_blocks(tokens // BLOCK_TOKENS + 1)
            return torch.where(query_aware, self._budget_blocks(torch.zeros_like(counts)), counts)

        columns = top_mask(estimate.column_mass, blocks_for(profiles.column))
        bands = top_mask(band_mass, blocks_for(profiles.distance))
        offset = (last_query // BLOCK_TOKENS).unsqueeze(1) - torch.arange(blocks, device=sample.device)
        return columns.unsqueeze(1) | bands[:, offset.clamp(min=0)] & (offset >= 0)

    def _pooled_map(
        self, query: torch.Tensor, estimate: FlexEstimate, causal: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The shortest prefix of all block pairs that covers `gamma` of the pooled map (section 3.3)."""
        chunk, heads, head_size = query.shape
        means = estimate.key_block_mean
        blocks = causal.shape[0]
        padded = torch.nn.functional.pad(query.float(), (0, 0, 0, 0, 0, blocks * self.query_block - chunk))
        counts = torch.full((blocks, 1, 1), float(self.query_block), device=query.device)
        counts[-1] = chunk - (blocks - 1) * self.query_block
        pooled = padded.view(blocks, self.query_block, heads, head_size).sum(1) / counts
        pooled = pooled.permute(1, 0, 2).reshape(means.shape[0], -1, head_size)
        logits = torch.matmul(pooled, means.transpose(1, 2)).mul(scale).view(heads, blocks, -1)
        weight = logits.masked_fill(~causal, float("-inf")).softmax(-1).flatten(1) / blocks
        if self.faithful:
            ordered, order = weight.sort(dim=1, descending=True, stable=True)
            keep = ordered.cumsum(1) <= self.gamma
            return torch.zeros_like(keep).scatter_(1, order, keep).view(heads, blocks, -1)
        return top_mask(weight, coverage_count(weight, self.gamma)).view(heads, blocks, -1)


def _band_blocks(bands: torch.Tensor, first_query: torch.Tensor, last_query: torch.Tensor) -> torch.Tensor:
    """Key blocks that a query block touches through any selected band: bool ``[heads, query_blocks, key_blocks]``.

    Band ``n`` of query positions ``q0..q1`` covers keys ``q0 - (n + 1) * block + 1`` to ``q1 - n * block``, so key
    block ``J`` is touched by bands ``ceil((q0 + 2) / block) - J - 2`` to ``floor(q1 / block) - J``.
    """
    count = bands.shape[1]
    key_block = torch.arange(count, device=bands.device)
    lowest = -(-(first_query + 2) // BLOCK_TOKENS).unsqueeze(1) - key_block - 2
    highest = (last_query // BLOCK_TOKENS).unsqueeze(1) - key_block
    touched = torch.zeros(bands.shape[0], *lowest.shape, dtype=torch.bool, device=bands.device)
    # A query block of at most 128 positions and a band of 128 distances meet in at most three key blocks.
    for step in range(3):
        band = lowest + step
        valid = (band >= 0) & (band <= highest) & (band < count)
        touched |= bands[:, band.clamp(0, count - 1)] & valid
    return touched


def coverage_count(mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """How many of the largest entries of each row reach a sum of `gamma`, the crossing one included: int64 ``[rows]``.

    All of them where they never do, and for ``gamma >= 1``.
    """
    if gamma >= 1:
        return torch.full((mass.shape[0],), mass.shape[1], dtype=torch.int64, device=mass.device)
    ordered = mass.double().sort(dim=1, descending=True).values
    return ((ordered.cumsum(1) < gamma).sum(1) + 1).clamp(max=mass.shape[1])


def top_mask(mass: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts` largest entries of each row, ties to the lower index: bool, the shape of `mass`."""
    order = mass.sort(dim=1, descending=True, stable=True).indices
    keep = torch.arange(mass.shape[1], device=mass.device) < counts.unsqueeze(1)
    return torch.zeros_like(keep).scatter_(1, order, keep)


def jensen_shannon_distance(first: torch.Tensor, second: torch.Tensor, guard_zeros: bool = True) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence of each row, natural logarithm: 0 to sqrt(ln 2).

    Args:
        first: ``[rows, n]`` probabilities.
        second: likewise.
        guard_zeros: take ``0 * log 0`` as 0; else it is NaN, as in the official code.
    """
    middle = (first + second) / 2

    def divergence(part: torch.Tensor) -> torch.Tensor:
        if guard_zeros:
            ratio = part / middle.clamp(min=torch.finfo(middle.dtype).tiny)
            guarded: torch.Tensor = torch.special.xlogy(part, ratio.clamp(min=torch.finfo(middle.dtype).tiny)).sum(1)
            return guarded
        unguarded: torch.Tensor = (part * (part / middle).log()).sum(1)
        return unguarded

    squared = (divergence(first) + divergence(second)) / 2
    return squared.clamp(min=0).sqrt() if guard_zeros else squared.sqrt().nan_to_num(nan=math.inf)
