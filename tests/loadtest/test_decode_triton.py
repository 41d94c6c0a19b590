"""The benchmark's selection of all rows at once, as on a GPU: Triton compiled there, interpreted elsewhere."""

from __future__ import annotations

import pytest
import torch

from loadtest.benchmarks.kernels import decode
from loadtest.benchmarks.kernels.batch import DecodeBatch
from loadtest.benchmarks.kernels.heads import synthetic_heads
from loadtest.benchmarks.kernels.truth import kept_mass, kept_tokens_of
from tests import oracle
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.registry import DECODE_METHODS

PLATFORM = oracle.Platform("plain", DEVICE, torch.float32 if DEVICE == "cpu" else torch.bfloat16, None)


@pytest.mark.skipif(CAN_RUN, reason="the tests below run in this process")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=1)


def batch_of(generator: torch.Generator, contexts: list[int]) -> DecodeBatch:
    """Rows of one text in the plain layout, each over a copy of its own."""
    seed = int(torch.randint(1 << 30, (1,), generator=generator))
    on_device = torch.Generator(DEVICE).manual_seed(seed)
    heads = synthetic_heads(on_device, len(contexts), max(contexts), 4, 2, 32, 6.0, PLATFORM.dtype)
    keys = [heads.keys[:, :context] for context in contexts]
    values = [heads.values[:, :context] for context in contexts]
    paged = oracle.paged(PLATFORM, keys, values, 32, generator)
    return DecodeBatch(heads, paged.kv_cache, paged.block_table, contexts, None, len(contexts))


@needs_triton
def test_rows_at_once_choose_as_requests_do(generator: torch.Generator) -> None:
    """In every step after the first."""
    batch = batch_of(generator, [298, 299, 300])
    methods = [DECODE_METHODS[name].with_budget(96) for name in DECODE_METHODS]
    for method in methods:
        assert isinstance(method, BatchDecodeMethod)
        choose, by_request = (
            select(method, batch, 2) for select in (decode.selection_at_once, decode.selection_by_request)
        )
        for _ in range(4):
            launch, expected = choose(), by_request()
            assert launch.kept_tokens.tolist() == expected.kept_tokens.tolist()
            for row in range(batch.rows):
                same = kept_tokens_of(batch, launch, row) == kept_tokens_of(batch, expected, row)
                # Scores of different kernels may tie differently.
                assert int((~same).sum()) <= 2 * len(same), method.name
        assert kept_mass(batch, launch) == pytest.approx(kept_mass(batch, expected), abs=1e-3)
