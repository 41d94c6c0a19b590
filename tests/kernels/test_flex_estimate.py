"""FlexPrefill's sample against full attention in float64, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from tests.oracle import PACKED, PLAIN, Platform
from vllm_sparse.kernels.flex_estimate import FlexEstimate, flex_estimate, last_queries, token_profiles
from vllm_sparse.kernels.token_scores import token_scores
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.step.chunks import chunk_alone

BLOCK = 128
SCALE = 0.13
# Contexts around a multiple of the tile (1024, formerly 4096), whose sampled rows straddle it, have rows for which a
# whole tile lies in the future.
SHAPES = [(1, 1), (127, 127), (128, 128), (128, 129), (5, 129), (128, 1000), (128, 4096), (128, 4099), (77, 4150)]


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest memory behind any tensor that an operator returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def estimate_of(sample: torch.Tensor, keys: PagedKeys) -> FlexEstimate:
    """The estimate of one prompt chunk."""
    chunk = chunk_alone(sample, keys, SCALE, BLOCK)
    return flex_estimate(chunk, last_queries(chunk.blocks, BLOCK))


def sampled_profiles(sample: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean mass of each key position and each distance, float64: two ``[heads, context]``."""
    rows, context = sample.shape[0], keys.shape[1]
    mass = oracle.probabilities(sample, keys, SCALE, oracle.causal_mask(rows, context)) / rows
    distance = torch.zeros(mass.shape[0], context, dtype=torch.float64)
    for row in range(rows):
        position = context - rows + row
        distance[:, : position + 1] += mass[:, row, : position + 1].flip(1)
    return mass.sum(1), distance


def block_sums(profile: torch.Tensor) -> torch.Tensor:
    """Sums over consecutive blocks, the last one ragged."""
    return torch.stack([part.sum(1) for part in torch.split(profile, BLOCK, dim=1)], dim=1)


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize(("rows", "context"), SHAPES)
def test_estimate_equals_full_attention(
    platform: Platform, rows: int, context: int, generator: torch.Generator
) -> None:
    for heads, kv_heads in ((2, 2), (3, 1)):
        data = oracle.random_paged(platform, generator, [context], kv_heads, 32, 32)
        sample = oracle.random_tensor(platform, generator, rows, heads, 32, spread=3)
        estimate = estimate_of(sample, data.reader(0))
        column, distance = sampled_profiles(sample, data.keys[0])
        means = torch.stack([part.mean(1) for part in torch.split(data.keys[0].double().cpu(), BLOCK, dim=1)], dim=1)
        for name, got, expected in (
            ("column mass", estimate.column_mass[:, 0], block_sums(column)),
            ("band mass", estimate.band_mass[:, 0], block_sums(distance)),
            ("mean keys", estimate.key_block_mean[:, 0], means),
        ):
            assert got.dtype == torch.float32
            assert got.shape == expected.shape, name
            assert oracle.relative_error(got, expected) < 1e-5, name


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize(("rows", "context"), SHAPES)
def test_token_profiles_equal_full_attention(
    platform: Platform, rows: int, context: int, generator: torch.Generator
) -> None:
    data = oracle.random_paged(platform, generator, [context], 1, 32, 64)
    sample = oracle.random_tensor(platform, generator, rows, 2, 32, spread=3)
    profiles = token_profiles(sample, data.reader(0), SCALE)
    column, distance = sampled_profiles(sample, data.keys[0])
    assert oracle.relative_error(profiles.column, column) < 1e-5
    assert oracle.relative_error(profiles.distance, distance) < 1e-5


def test_extreme_logits_stay_finite(generator: torch.Generator) -> None:
    """Logits in the thousands, of both signs, over several tiles: no overflow, no NaN, the right masses."""
    context = 9000
    data = oracle.random_paged(PLAIN, generator, [context], 1, 32, 64)
    sample = oracle.random_tensor(PLAIN, generator, 128, 2, 32, spread=3000)
    estimate = estimate_of(sample, data.reader(0))
    column, distance = sampled_profiles(sample, data.keys[0])
    # float32 logits of that size carry errors near 1e-3, which the exponential turns into relative errors of mass.
    assert oracle.relative_error(estimate.column_mass[:, 0], block_sums(column)) < 1e-2
    assert oracle.relative_error(estimate.band_mass[:, 0], block_sums(distance)) < 1e-2
    profiles = token_profiles(sample, data.reader(0), SCALE)
    assert oracle.relative_error(profiles.column, column) < 1e-2
    assert oracle.relative_error(profiles.distance, distance) < 1e-2


def long_keys(context: int, head_size: int) -> PlainKeys:
    """A long request in bfloat16, cheap to make: one block of random numbers, repeated by the block table."""
    cache = torch.randn(1, 1, 256, 2 * head_size).bfloat16()
    return PlainKeys(cache, torch.zeros(context // 256, dtype=torch.int32), context)


CONTEXT, HEADS, HEAD_SIZE = 131072, 1, 16


def test_estimate_holds_no_score_matrix() -> None:
    """At 128K, no tensor near ``[heads, 128, context]``. One head stands for 32: every buffer is linear in heads."""
    sample = torch.randn(128, HEADS, HEAD_SIZE).bfloat16()
    keys = long_keys(CONTEXT, HEAD_SIZE)
    with Largest() as largest:
        estimate_of(sample, keys)
    assert 0 < largest.bytes <= 4 * HEADS * 128 * CONTEXT // 16


def test_faithful_mode_holds_no_score_matrix() -> None:
    query = torch.randn(256, HEADS, HEAD_SIZE).bfloat16()
    with Largest() as largest:
        FlexPrefill(faithful=True).select(query, long_keys(CONTEXT, HEAD_SIZE), SCALE, 128, Layer(0, 0))
    assert 0 < largest.bytes <= 4 * HEADS * 128 * CONTEXT // 16


def test_token_scores_hold_no_copy_of_the_keys() -> None:
    """Scores are linear in the context; the keys' float copy must not be, at any head size."""
    context, head_size = 4 * CONTEXT, 32
    keys = long_keys(context, head_size)
    with Largest() as largest:
        token_scores(torch.randn(2, head_size).bfloat16(), keys, SCALE, merge_heads=True)
    assert 0 < largest.bytes <= 4 * context * head_size // 4
