"""Attention-mass recall: the share of the true softmax that a list keeps, of a few queries of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import prometheus_client
import torch

from vllm_sparse.metrics.histogram import observe_all
from vllm_sparse.pages import PageList, page_mask

if TYPE_CHECKING:
    import numpy as np

    from vllm_sparse.keys import PagedKeys

SAMPLED_QUERIES = 4
RECALL_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 1.0)
# Keys that are scored at a time, so that the room needed does not grow with the context.
SEGMENT_TOKENS = 8192


class RecallMetrics:
    """Prometheus histogram of sampled recalls.

    Args:
        model_name: label of the metric, as of vLLM's own.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._ratio = prometheus_client.Histogram(
            "vllm_sparse_recall_ratio",
            "Attention mass that the lists keep, of sampled queries in one sampled layer of a sampled chunk or decode "
            "step; one observation per query head.",
            ["model_name", "phase", "method"],
            buckets=RECALL_BUCKETS,
        )

    def observe(self, phase: str, method: str, recall: np.ndarray) -> None:
        """Recall of each query head of a row: float32 ``[query_heads]``."""
        observe_all(self._ratio.labels(self._model_name, phase, method), recall.tolist())


@dataclass(frozen=True)
class RecallSample:
    """A row in one layer, whose recall is measured; attributes as the arguments of `attention_recall`."""

    query: torch.Tensor
    keys: PagedKeys
    lists: PageList
    query_block: int
    scale: float
    soft_cap: float = 0.0

    def recall(self) -> torch.Tensor:
        """Attention-mass recall: float32 ``[query_heads]``."""
        return attention_recall(self.query, self.keys, self.lists, self.query_block, self.scale, self.soft_cap)


def attention_recall(
    query: torch.Tensor, keys: PagedKeys, lists: PageList, query_block: int, scale: float, soft_cap: float = 0.0
) -> torch.Tensor:
    """Softmax mass of the keys in a query's list over that of all keys in its reach; sinks take no part.

    Measured on `SAMPLED_QUERIES` query tokens that are spread evenly over the chunk, in each query head.

    Args:
        query: ``[chunk, query_heads, head_size]``, at the last positions of the context.
        keys: the request's keys, the chunk's included.
        lists: of ``list_heads * ceil(chunk / query_block)`` rows, head-major.
        query_block: query tokens that share a list.
        scale: softmax scale.
        soft_cap: on logits; 0: none.

    Returns:
        float32 ``[query_heads]``, 0 to 1, mean over the sampled queries.
    """
    chunk, query_heads, head_size = query.shape
    context, device = keys.seq_len, query.device
    sampled = min(SAMPLED_QUERIES, chunk)
    # The middle of each of as many equal parts.
    token = (torch.arange(sampled, device=device) * 2 + 1) * chunk // (2 * sampled)
    position = (context - chunk + token).view(-1, 1, 1)
    kept_pages = _page_mask(lists, token // query_block, -(-chunk // query_block), context)
    queries = query[token].float().view(sampled, keys.num_kv_heads, -1, head_size)
    mass = torch.full((2, sampled, query_heads), float("-inf"), device=device)
    for start in range(0, context, SEGMENT_TOKENS):
        stop = min(start + SEGMENT_TOKENS, context)
        logits = torch.einsum("skgd,knd->skgn", queries, keys.read(start, stop).float()).flatten(1, 2) * scale
        if soft_cap:
            logits = soft_cap * (logits / soft_cap).tanh()
        key = torch.arange(start, stop, device=device)
        logits = logits.masked_fill(key > position, float("-inf"))
        kept = kept_pages[..., key // lists.page_size_tokens]
        kept = kept.repeat_interleave(query_heads // kept.shape[1], dim=1)
        segment = torch.stack([logits.masked_fill(~kept, float("-inf")), logits]).logsumexp(3)
        mass = torch.logaddexp(mass, segment)
    return (mass[0] - mass[1]).exp().mean(0)


def _page_mask(lists: PageList, block: torch.Tensor, blocks: int, seq_len: int) -> torch.Tensor:
    """Pages in the lists of some query blocks of each head: bool ``[blocks asked for, list_heads, pages]``."""
    list_heads = lists.kept_tokens.shape[0] // blocks
    row = (torch.arange(list_heads, device=block.device) * blocks + block.unsqueeze(1)).flatten()
    of_rows = PageList(lists.pages[row], lists.kept_tokens[row], lists.page_size_tokens)
    pages = -(-seq_len // lists.page_size_tokens)
    return page_mask(of_rows, pages).view(-1, list_heads, pages)
