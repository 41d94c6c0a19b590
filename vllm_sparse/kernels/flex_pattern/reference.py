"""FlexPrefill's pattern switch and pooled map in PyTorch: the specification, on any device."""

from __future__ import annotations

import math

import torch

from vllm_sparse.step.chunks import PromptBlocks


def pooled_distance(
    scores: torch.Tensor,
    column_mass: torch.Tensor,
    samples: PromptBlocks,
    key_block_tokens: int,
    scale: float,
    guard_zeros: bool,
) -> torch.Tensor:
    """Distance of pooled from sampled attention, one chunk after another; arguments as in the public function."""
    distances = []
    for chunk, span in enumerate(samples.spans):
        in_context = slice(-(-span.seq_len // key_block_tokens))
        logits = scores[:, chunk, in_context] * (scale / span.query_tokens**0.5)
        mass = column_mass[:, chunk, in_context]
        distances.append(jensen_shannon_distance(logits.softmax(-1), mass, guard_zeros))
    return torch.stack(distances, dim=1)


def pooled_attention(scores: torch.Tensor, blocks: PromptBlocks, key_block_tokens: int, scale: float) -> torch.Tensor:
    """Attention of mean queries to mean keys, one chunk after another; arguments as in the public function."""
    attention = torch.zeros_like(scores)
    # Pooled queries are means times the root of their number.
    factor = scale / (blocks.last_query - blocks.first_query + 1).sqrt().unsqueeze(1)
    last_block = (blocks.last_query // key_block_tokens).unsqueeze(1)
    for chunk, span in enumerate(blocks.spans):
        rows = slice(blocks.starts[chunk], blocks.starts[chunk + 1])
        in_context = slice(-(-span.seq_len // key_block_tokens))
        logits = scores[:, rows, in_context] * factor[rows]
        future = torch.arange(logits.shape[2], device=scores.device) > last_block[rows]
        weight = logits.masked_fill_(future, float("-inf")).softmax(-1)
        attention[:, rows, in_context] = weight.div_(rows.stop - rows.start)
    return attention


def jensen_shannon_distance(first: torch.Tensor, second: torch.Tensor, guard_zeros: bool = True) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence of each row, natural logarithm: 0 to sqrt(ln 2).

    Args:
        first: ``[rows, n]`` probabilities.
        second: ``[rows, n]`` probabilities.
        guard_zeros: take ``0 * log 0`` as 0; else the row is infinite, as in the official code.
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
