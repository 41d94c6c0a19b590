"""Codes of keys against the keys in float64, and scores by codes against float64 probabilities of what codes say."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.oracle import PACKED, PLAIN, Platform
from vllm_sparse.kernels.code_scores import code_scores
from vllm_sparse.kernels.page_summaries import SummaryKind, coded_keys, read_summaries, store_summaries


def decoded(summary: list[int], tokens: int, head_size: int) -> torch.Tensor:
    """Keys ``[tokens, head_size]`` that the bytes of a page say, number by number."""
    numbers = torch.tensor(summary[: 4 * head_size], dtype=torch.uint8).view(torch.float16).double().tolist()
    quarter = head_size // 4
    keys = torch.empty(tokens, head_size, dtype=torch.float64)
    for token in range(tokens):
        for channel in range(head_size):
            byte = summary[4 * head_size + token * quarter + channel % quarter]
            code = byte >> 2 * (channel // quarter) & 3
            keys[token, channel] = numbers[channel] + numbers[head_size + channel] * code
    return keys


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize(("page_tokens", "head_size"), [(16, 64), (32, 32), (32, 96)])
def test_codes_say_keys_to_half_a_step(
    platform: Platform, page_tokens: int, head_size: int, generator: torch.Generator
) -> None:
    """Pages of other signs and sizes, a channel without change, one beyond float16, and a short last page."""
    context = 5 * page_tokens + 7
    offset = 10 * torch.randn(2, 6, head_size, generator=generator).repeat_interleave(page_tokens, 1)[:, :context]
    keys = oracle.random_tensor(platform, generator, 2, context, head_size) + offset.to(platform.device, platform.dtype)
    keys[:, :, 3] = 1.5
    if platform.dtype != torch.float16:
        keys[0, 3, 5] = 1e6
    data = oracle.paged(platform, [keys], [keys], 32, generator)
    kind = SummaryKind(page_tokens, "codes")
    blocks, kv_heads = data.kv_cache.shape[:2]
    request = data.reader(0)
    request.summaries = torch.full(
        (blocks, kv_heads, 32 // page_tokens, kind.width(head_size)), 0xAA, dtype=torch.uint8, device=keys.device
    )
    store_summaries(request, kind, 0)
    summaries = read_summaries(request, kind)
    said = coded_keys(summaries, head_size)
    assert bool(said.isfinite().all())
    for head in range(2):
        for page in range(6):
            tokens = min(page_tokens, context - page * page_tokens)
            own = decoded(summaries[head, page].tolist(), tokens, head_size)
            first = page * page_tokens
            assert oracle.relative_error(said[head, first : first + tokens], own) < 1e-6
            exact = keys[head, first : first + tokens].double().cpu()
            step = (exact.amax(0) - exact.amin(0)) / 3
            # Least numbers and steps are rounded to 11 bits.
            slack = 2e-3 * exact.abs().amax(0)
            ordinary = exact.abs().amax(0) < 60000
            assert bool(((own - exact).abs() <= step / 2 + slack)[:, ordinary].all())
            # The channel that goes beyond float16 has the nearest that there is, and harms no other.
            assert bool((own[:, ~ordinary].abs() <= 4 * 65504).all())


def test_computed_codes_are_the_stored_ones(generator: torch.Generator) -> None:
    """Written in steps of any length, each of which begins in the middle of a block."""
    data = oracle.random_paged(PLAIN, generator, [333], 2, 32, 64)
    kind = SummaryKind(32, "codes")
    request = data.reader(0)
    computed = read_summaries(request, kind)
    shape = data.kv_cache.shape[0], 2, 2, kind.width(32)
    summaries = torch.full(shape, 0x55, dtype=torch.uint8, device=computed.device)
    for start, stop in ((0, 100), (100, 101), (101, 290), (290, 333)):
        keys = data.platform.keys_of(data.kv_cache, data.block_table[0], stop)
        keys.summaries = summaries
        store_summaries(keys, kind, start)
    request.summaries = summaries
    said = coded_keys(read_summaries(request, kind), 32)[:, :333]
    assert torch.equal(said, coded_keys(computed, 32)[:, :333])


@pytest.mark.parametrize("context", [1, 32, 999])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1)])
def test_scores_equal_float64_probabilities(
    context: int, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    """The last page counts by its keys themselves."""
    data = oracle.random_paged(PLAIN, generator, [context], kv_heads, 32, 32)
    kind, request = SummaryKind(32, "codes"), data.reader(0)
    query = oracle.random_tensor(PLAIN, generator, heads, 32, spread=2)
    coded = context // 32 * 32
    keys = torch.cat((coded_keys(read_summaries(request, kind), 32)[:, :coded], data.keys[0][:, coded:].float()), dim=1)
    expected = oracle.probabilities(query.unsqueeze(0), keys, 0.2, torch.ones(context, dtype=torch.bool))[:, 0]
    found = code_scores(query, request, kind, 0.2)
    assert found.dtype == torch.float32
    assert oracle.relative_error(found.exp(), expected.view(kv_heads, -1, context).amax(1)) < 1e-5
