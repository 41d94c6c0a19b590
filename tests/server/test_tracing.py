"""Span attributes that only a GPU server has; the others are tested on a server (`tests/serving/test_spans.py`)."""

from __future__ import annotations

import pytest
import torch

from vllm_sparse.config.request import SparseParams
from vllm_sparse.keys import plain_keys
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import BatchDecodeMethod, LayerMemory
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.server.spans import span_attributes

DENSITY = "vllm_sparse.decode.density"
PROMPT, LAST = 290, 330


@pytest.mark.parametrize(
    ("method", "min_tokens"),
    [
        (Tidal(budget_tokens=100, sink_tokens=7, recent_tokens=30), 0),
        (Tidal(budget_tokens=300, sink_tokens=7, recent_tokens=30), 0),
        (BlockTopk(budget_tokens=90, sink_tokens=7, recent_tokens=30), 0),
        (BlockTopk(budget_tokens=90, sink_tokens=7, recent_tokens=30), 310),
        (Tidal(budget_tokens=100, sink_tokens=7, recent_tokens=30, dense_every_steps=7), 0),
    ],
)
def test_decode_density_is_that_of_the_lists(
    method: BatchDecodeMethod, min_tokens: int, generator: torch.Generator
) -> None:
    """Of the steps that run sparse, each choosing among random keys."""
    keys, queries = torch.randn(2, LAST, 16, generator=generator), torch.randn(LAST + 1, 4, 16, generator=generator)
    densities = []
    for context in range(PROMPT + 1, LAST + 1):
        if context >= min_tokens and context > method.budget_tokens:
            reader = plain_keys(keys[:, :context])
            lists = method.select(queries[context], reader, 0.25, 1, LayerMemory())
            is_dense = method.dense_every_steps and context % method.dense_every_steps == 0
            densities.append(1.0 if is_dense else float(lists.kept_tokens.float().mean()) / context)
    found = span_attributes(SparseParams(None, method, min_tokens), PROMPT, LAST, token_lists=True)
    assert found[DENSITY] == pytest.approx(sum(densities) / len(densities), rel=1e-6)
    # Lists of whole blocks are as long as the text wants.
    assert DENSITY not in span_attributes(SparseParams(None, method, min_tokens), PROMPT, LAST, token_lists=False)


def test_no_density_without_a_sparse_decode_step() -> None:
    method = Tidal(budget_tokens=500)
    assert DENSITY not in span_attributes(SparseParams(None, method, 0), PROMPT, LAST, token_lists=True)
    assert DENSITY not in span_attributes(
        SparseParams(None, Tidal(budget_tokens=100), 0), PROMPT, PROMPT, token_lists=True
    )
    assert DENSITY not in span_attributes(SparseParams(None, None, 0), PROMPT, LAST, token_lists=True)
