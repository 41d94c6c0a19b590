"""The search for SALE's thresholds per layer and query head (arXiv 2505.24179, section 3.3).

The paper bounds the absolute error of a head's output, summed over channels, which has to be chosen anew for each
model; here the bound is relative to the norm of the dense output.
"""

from __future__ import annotations

import math

import torch

from vllm_sparse.kernels.low_bit_scores import PAGE_TOKENS, LowBitScoring, kept_maps, middle_pages
from vllm_sparse.keys import plain_keys
from vllm_sparse.methods.sale.thresholds import log_thresholds
from vllm_sparse.step.chunks import chunk_alone

# Thresholds are halved until the error is within the bound; below the least one a head stays dense.
FIRST_TAU = 0.008
LEAST_TAU = 1e-4
QUERY_BLOCK_TOKENS = 64
SINK_TOKENS = 32
LOCAL_TOKENS = 128
# Query blocks whose scores are held at once.
TILE_BLOCKS = 8


class SaleCalibrator:
    """Lowers each head's threshold until its output is right on every prompt seen.

    Dense inputs are given to every layer, so layers do not depend on one another. Thresholds only fall, from prompt to
    prompt, and depend on nothing but the prompts and their order.

    Args:
        layers: attention layers.
        heads: query heads of a layer.
        error_bound: largest relative error of a head's output over a prompt: the Frobenius norm of what sparsity
            changes over the norm of the dense output.
        first_tau: where the thresholds begin.
    """

    def __init__(self, layers: int, heads: int, error_bound: float, first_tau: float = FIRST_TAU) -> None:
        self.error_bound = error_bound
        self.thresholds = [[first_tau] * heads for _ in range(layers)]

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> list[float]:
        """Lower a layer's thresholds as far as one prompt needs.

        Args:
            layer: index of the layer.
            query: ``[heads, tokens, head_size]``, rotary positions applied.
            key: ``[kv_heads, tokens, head_size]``, likewise.
            value: ``[kv_heads, tokens, head_size]``.
            scale: softmax scale.

        Returns:
            The relative error of each head at its new threshold.
        """
        taus = self.thresholds[layer]
        group = query.shape[0] // key.shape[0]
        errors = [math.inf if tau > 0 else 0.0 for tau in taus]
        while wrong := [head for head, error in enumerate(errors) if error > self.error_bound]:
            kept = prompt_map(query, key, scale, taus)
            for head in wrong:
                kv_head = head // group
                errors[head] = head_error(query[head], key[kv_head], value[kv_head], scale, kept[head])
                if errors[head] > self.error_bound:
                    taus[head] = taus[head] / 2 if taus[head] / 2 > LEAST_TAU else 0.0
                    if taus[head] == 0:
                        errors[head] = 0.0
        return errors


def prompt_map(query: torch.Tensor, key: torch.Tensor, scale: float, taus: list[float]) -> torch.Tensor:
    """Pages that the method's defaults keep of a whole prompt: bool ``[heads, query_blocks, pages]``.

    Arguments as in `SaleCalibrator.observe`, `taus` one threshold a head.
    """
    chunk = chunk_alone(query.transpose(0, 1), plain_keys(key), scale, QUERY_BLOCK_TOKENS)
    scoring = LowBitScoring(
        bits=8,
        page_bounds=True,
        sink_tokens=SINK_TOKENS,
        local_tokens=LOCAL_TOKENS,
        query_block_tokens=QUERY_BLOCK_TOKENS,
    )
    return kept_maps(chunk, middle_pages(chunk.blocks, scoring), log_thresholds(taus, query.device), scoring)


def head_error(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, kept: torch.Tensor) -> float:
    """Relative error of one head's output over a whole prompt: Frobenius norm of the difference over the dense one's.

    Args:
        query: ``[tokens, head_size]``.
        key: likewise.
        value: likewise.
        scale: softmax scale.
        kept: bool ``[query_blocks, pages]``.
    """
    tokens = query.shape[0]
    key, value = key.float(), value.float()
    difference = norm = torch.zeros((), dtype=torch.float64, device=query.device)
    for block in range(0, kept.shape[0], TILE_BLOCKS):
        start = block * QUERY_BLOCK_TOKENS
        stop = min(start + TILE_BLOCKS * QUERY_BLOCK_TOKENS, tokens)
        scores = (query[start:stop].float() @ key[:stop].t()).mul_(scale)
        position = torch.arange(stop, device=query.device)
        scores.masked_fill_(position > position[start:, None], -math.inf)
        weight = scores.softmax(1)
        row_block = torch.arange(start, stop, device=query.device) // QUERY_BLOCK_TOKENS
        allowed = kept[row_block].repeat_interleave(PAGE_TOKENS, 1)[:, :stop]
        # A row's own positions are always read, so that no row is left without weight.
        allowed |= position >= (row_block * QUERY_BLOCK_TOKENS)[:, None]
        sparse = weight * allowed
        dense_output = weight @ value[:stop]
        sparse_output = sparse @ value[:stop] / sparse.sum(1, keepdim=True)
        difference = difference + (sparse_output - dense_output).double().square().sum()
        norm = norm + dense_output.double().square().sum()
    return float((difference / norm.clamp(min=1e-30)).sqrt())
