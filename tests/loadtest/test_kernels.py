"""The benchmark of single layers: what it calls true, kept and recalled is that."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from loadtest.benchmarks.kernels import prefill
from loadtest.benchmarks.kernels.cache import write_cache
from loadtest.benchmarks.kernels.heads import Heads, recorded_heads, synthetic_heads
from loadtest.benchmarks.kernels.truth import TrueMass, block_mass, kept_blocks, recall
from tests import oracle
from tests.methods.lists import FIRST_LAYER
from vllm_sparse.methods.flexprefill import FlexPrefill

needs_executor = pytest.mark.skipif(
    not oracle.CPU_KERNEL and not oracle.has_hopper(), reason="needs vLLM's CPU kernel or a Hopper GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def heads_of(chunk: int, context: int, concentration: float, seed: int, dtype: torch.dtype = torch.bfloat16) -> Heads:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return synthetic_heads(generator, chunk, context, 4, 2, 64, concentration, dtype)


def truth(heads: Heads) -> torch.Tensor:
    """Attention probabilities in float64."""
    allowed = oracle.causal_mask(heads.chunk, heads.context)
    return oracle.probabilities(heads.query, heads.keys, heads.scale, allowed)


@pytest.mark.parametrize(("chunk", "context"), [(256, 1024), (100, 1001), (1, 17)])
def test_block_mass_is_the_true_mass(chunk: int, context: int, generator: torch.Generator) -> None:
    heads = heads_of(chunk, context, 4.0, int(torch.randint(1 << 30, (1,), generator=generator)))
    mass = block_mass(heads).cpu()
    assert mass.shape == (4, -(-chunk // 64), -(-context // 16))
    exact = torch.nn.functional.pad(truth(heads), (0, -context % 16, 0, -chunk % 64))
    exact = exact.view(4, -(-chunk // 64), 64, -1, 16).sum((2, 4))
    assert oracle.relative_error(mass, exact) < 1e-5


@needs_executor
@pytest.mark.parametrize("rows", ["query_head", "kv_head"])
def test_recall_is_the_mass_of_the_listed_keys(
    rows: Literal["query_head", "kv_head"], generator: torch.Generator
) -> None:
    chunk, context = 300, 1500
    heads = heads_of(chunk, context, 4.0, int(torch.randint(1 << 30, (1,), generator=generator)))
    cache = write_cache(heads, 32, torch.Generator(DEVICE).manual_seed(0))
    method = FlexPrefill(gamma=0.3, min_budget_tokens=128, list_per=rows)
    lists = prefill.select(method, cache)
    kept = kept_blocks(lists, context).cpu().repeat_interleave(16, dim=1)[:, :context]
    kept = kept.view(-1, 3, context).repeat_interleave(128, dim=1)[:, :chunk]
    kept = kept.repeat_interleave(4 // kept.shape[0], dim=0)
    expected = float((truth(heads) * kept).sum() / (4 * chunk))
    assert 0.05 < expected < 0.999
    assert recall(block_mass(heads), lists, 128, chunk, context) == pytest.approx(expected, abs=1e-4)


@needs_executor
def test_the_truth_beats_a_method_of_equal_density() -> None:
    heads = heads_of(512, 4096, 6.0, 1)
    cache = write_cache(heads, 32, torch.Generator(DEVICE).manual_seed(0))
    measured = list(prefill.measure("heads", cache, {"flexprefill": prefill.FAMILIES["flexprefill"]}, [0.2], repeats=1))
    method, best = measured
    assert (method.method, best.method) == ("flexprefill", "true mass")
    assert method.density == pytest.approx(0.2, abs=0.02)
    assert best.density == pytest.approx(0.2, abs=0.02)
    assert best.recall > method.recall
    assert 0 < best.error < method.error < 1.5
    assert method.dense_seconds > 0
    assert method.selection_seconds > 0


@needs_executor
def test_dense_and_full_lists_equal_float64() -> None:
    heads = heads_of(257, 1000, 3.0, 2)
    cache = write_cache(heads, 32, torch.Generator(DEVICE).manual_seed(0))
    allowed = oracle.causal_mask(257, 1000)
    exact = oracle.attention(heads.query, heads.keys, heads.values, heads.scale, allowed)
    oracle.assert_close(cache.dense(), exact)
    everything = TrueMass(block_mass(heads), 1.0)
    lists = everything.select(heads.query, cache.keys, heads.scale, 32, FIRST_LAYER)
    assert recall(everything.mass, lists, everything.query_block_tokens, 257, 1000) == pytest.approx(1, abs=1e-5)
    assert prefill.density_of(everything, lists, heads) == pytest.approx(1)


def test_concentration_sharpens_synthetic_heads() -> None:
    def top_share(concentration: float) -> float:
        # float32: CPUs that emulate bfloat16 take minutes for these.
        mass = block_mass(heads_of(256, 4096, concentration, 3, torch.float32)).flatten(0, 1)
        return float((mass.topk(25, dim=1).values.sum(1) / mass.sum(1)).mean())

    flat, middle, sharp = (top_share(concentration) for concentration in (0.0, 4.0, 16.0))
    assert flat < 0.3 < middle < sharp


@needs_executor
def test_recorded_heads_are_what_the_model_attends_with() -> None:
    """The recorded queries of a short text, attended densely, are a causal softmax over as many keys as tokens."""
    tokens = list(range(300, 460))
    first, last = recorded_heads(str(prefill.BUNDLED_MODEL), tokens, 64, [0, 7])
    for heads in (first, last):
        assert heads.query.shape == (64, 4, 64)
        assert heads.keys.shape == heads.values.shape == (2, len(tokens), 64)
        assert heads.scale == pytest.approx(64**-0.5)
    assert not torch.equal(first.keys, last.keys)
    # The first layer's heads look one to four tokens back by construction (loadtest.model.network).
    mass = truth(first)
    assert float(mass[0, -1, -16:].sum()) > 0.5


def test_the_table_has_a_line_per_measurement() -> None:
    one = prefill.Measurement("synthetic 4", 32768, 8192, "dhsa", 0.1, 0.001, 0.01, 0.1, 0.9, 0.05)
    other = prefill.Measurement("synthetic 4", 32768, 8192, "dhsa", 0.1, 0.003, 0.01, 0.1, 0.7, 0.15)
    mean = prefill.mean_of([one, other])
    assert mean.selection_seconds == pytest.approx(0.002)
    assert mean.speedup == pytest.approx(0.1 / 0.012)
    assert mean.efficiency == pytest.approx(1.0)
    assert prefill.line(mean).count("|") == prefill.HEADER.split("\n")[0].count("|")
