"""SALE's quantisers, thresholds and scores against float64, and their memory."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.kernels.test_flex_estimate import CONTEXT, Largest, long_keys
from tests.oracle import PACKED, PLAIN, Paged, Platform
from vllm_sparse.kernels.low_bit_scores import LowBitScoring, reference

SCALE = 0.13
PAGE = 32
BITS = pytest.mark.parametrize("bits", [4, 8])
# Tokens of a page that share a scale.
GROUPS = [[token for token in range(PAGE) if token % 8 // 2 == group] for group in range(4)]


def request(
    generator: torch.Generator, context: int, kv_heads: int, head_size: int, platform: Platform = PLAIN
) -> Paged:
    """Keys of very different sizes, around means that are far from 0; one page of zeros, one of equal keys."""
    keys = oracle.random_tensor(platform, generator, kv_heads, context, head_size)
    keys *= oracle.random_tensor(platform, generator, kv_heads, context, 1).exp()
    keys += 3 * oracle.random_tensor(platform, generator, kv_heads, 1, head_size)
    keys[:, PAGE : 2 * PAGE] = 0
    keys[:, 2 * PAGE : 3 * PAGE] = keys[:, 2 * PAGE : 2 * PAGE + 1].clone()
    return oracle.paged(platform, [keys], [keys], 32, generator)


@BITS
@pytest.mark.parametrize("platform", PACKED)
def test_s5_keys_are_quantised_in_the_papers_groups(bits: int, platform: Platform, generator: torch.Generator) -> None:
    pages, kv_heads, head_size = 9, 2, 64
    data = request(generator, pages * PAGE + 5, kv_heads, head_size, platform)
    quantised = reference.quantise_keys(data.reader(0), pages, bits)
    keys = data.keys[0][:, : pages * PAGE].double().cpu().view(kv_heads, pages, PAGE, head_size)
    top = 7 if bits == 4 else 127
    assert int(quantised.levels.abs().max()) == top
    mean = quantised.mean.double().cpu()
    assert oracle.relative_error(mean, keys.mean(2)) < (1e-5 if platform.dtype == torch.float32 else 1e-2)
    rest = keys - mean.unsqueeze(2)
    largest_error = torch.zeros(kv_heads, pages, dtype=torch.float64)
    for group, tokens in enumerate(GROUPS):
        scale = quantised.scale[:, :, group].double().cpu()
        members = rest[:, :, tokens]
        assert torch.allclose(scale, (members.abs().amax((2, 3)) / top).clamp(min=1e-30), rtol=1e-5)
        error = members - quantised.levels[:, :, group].double().cpu() * scale[..., None, None]
        assert bool((error.abs() <= scale[..., None, None] * 0.50001 + 1e-6).all())
        largest_error = torch.maximum(largest_error, error.norm(dim=3).amax(2))
    radius = rest.norm(dim=3).amax(2)
    # Norms are rounded up a little, 4 bits count no error.
    allowance = (radius + mean.norm(dim=2)) * 1e-4
    if bits == 4:
        largest_error.zero_()
    for bound, norm in ((quantised.radius, radius), (quantised.error, largest_error)):
        assert bool((bound.double().cpu() >= norm).all())
        assert bool((bound.double().cpu() <= norm + allowance).all())


@BITS
@pytest.mark.parametrize("rows", [1, 8, 9, 64, 77])
def test_s5_queries_are_quantised_in_the_papers_groups(bits: int, rows: int, generator: torch.Generator) -> None:
    """Rows r and r + 8 of each 16 share a scale, at the ragged end too; rows of zeros stay finite."""
    query = torch.randn(3, rows, 48, generator=generator) * torch.randn(3, rows, 1, generator=generator).exp()
    query[1] = 0
    quantised = reference.quantise_queries(query, bits)
    top = 7 if bits == 4 else 127
    for row in range(rows):
        partners = [other for other in range(rows) if other // 16 == row // 16 and other % 8 == row % 8]
        scale = query[:, partners].abs().amax((1, 2)) / top
        assert torch.allclose(quantised.scale[:, row], scale.clamp(min=1e-30))
    error = query - quantised.levels * quantised.scale.unsqueeze(2)
    assert bool((error.abs() <= quantised.scale.unsqueeze(2) * 0.50001).all())
    assert int(quantised.levels.abs().max()) == top
    assert bool((quantised.levels[1] == 0).all())
    assert torch.allclose(quantised.norm, query.norm(dim=2))
    expected = error.norm(dim=2) if bits == 8 else torch.zeros(3, rows)
    assert torch.allclose(quantised.error, expected, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False], ids=["integers", "float32"])
@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_s4_products_are_those_of_the_integers(
    exact: bool, head_size: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extreme integers too, which saturate where a CPU adds products in 16 bits."""
    if not exact:
        monkeypatch.setattr(reference, "_multiplies_integers", lambda: False)
    left = torch.randint(-127, 128, (96, head_size), generator=generator).to(torch.int8)
    right = torch.randint(-127, 128, (head_size, 64), generator=generator).to(torch.int8)
    left[:9], right[:, :9] = 127, -127
    left[9:12], right[:, 9:12] = -127, -127
    products = reference.integer_products(left, right)
    assert torch.equal(products.long(), left.long() @ right.long())


@pytest.mark.parametrize("platform", PACKED)
@pytest.mark.parametrize(
    ("query_tokens", "context", "sink", "local", "query_block_tokens"),
    [
        (1, 1, 32, 128, 64),
        (130, 130, 32, 128, 64),
        (200, 777, 64, 128, 64),
        (1111, 1300, 32, 0, 64),
        (300, 777, 32, 100, 128),
    ],
)
def test_thresholds_are_relative_to_sink_and_local_window(
    platform: Platform,
    query_tokens: int,
    context: int,
    sink: int,
    local: int,
    query_block_tokens: int,
    generator: torch.Generator,
) -> None:
    """And a little lower, never higher."""
    heads, kv_heads = 4, 2
    data = request(generator, context, kv_heads, 32, platform)
    query = oracle.random_tensor(platform, generator, query_tokens, heads, 32, spread=2)
    log_tau = torch.tensor([-3.0, 0.0, 1.5, -0.5], device=platform.device)
    rows = query.transpose(0, 1).float()
    scoring = LowBitScoring(8, True, sink, local, query_block_tokens)
    least = reference.thresholds(rows, data.reader(0), SCALE, log_tau, scoring).double().cpu()
    scores = torch.einsum("qhd,hkd->hqk", query.double().cpu(), oracle.expand(data.keys[0], heads)) * SCALE
    largest_key = data.keys[0].double().cpu().norm(dim=2).max()
    key = torch.arange(context)
    for row in torch.randperm(query_tokens, generator=generator)[:100].tolist():
        position = context - query_tokens + row
        first = position - row % query_block_tokens
        last = min(first + query_block_tokens, context) - 1
        window = min(max(last + 1 - local, 0), first) // PAGE * PAGE
        near = ((key < sink) | (key >= window)) & (key <= position)
        expected = scores[:, row, near].logsumexp(1) + log_tau.double().cpu()
        assert bool((least[:, row] <= expected).all()), f"row {row}"
        allowance = query[row].double().cpu().norm(dim=1) * largest_key * (SCALE * 1e-4) + 1e-3
        assert bool((least[:, row] >= expected - allowance).all()), f"row {row}"


def transcription(query: torch.Tensor, data: Paged, sink: int, local: int, query_block_tokens: int) -> torch.Tensor:
    """The paper's 4-bit map in float64, key by key: logarithm of the largest tau that keeps each page of a block.

    ``[heads, blocks, pages]``, infinite for the sink and the local window.
    """
    query_tokens, heads, _ = query.shape
    kv_heads, context, _ = data.keys[0].shape
    blocks, pages = -(-query_tokens // query_block_tokens), -(-context // PAGE)
    passing = torch.full((heads, blocks, pages), float("inf"), dtype=torch.float64)
    exact = torch.einsum("qhd,hkd->hqk", query.double(), oracle.expand(data.keys[0], heads)) * SCALE
    for head in range(heads):
        keys = data.keys[0][head * kv_heads // heads].double()
        for block in range(blocks):
            rows = list(range(block * query_block_tokens, min((block + 1) * query_block_tokens, query_tokens)))
            first, last = context - query_tokens + rows[0], context - query_tokens + rows[-1]
            window = min(max(last + 1 - local, 0), first) // PAGE
            for page in range(sink // PAGE, window):
                best = -float("inf")
                inside = keys[page * PAGE : (page + 1) * PAGE]
                mean = inside.mean(0)
                for row in rows:
                    partner = [other for other in rows if (other - rows[0]) // 16 == (row - rows[0]) // 16]
                    partner = [other for other in partner if (other - row) % 8 == 0]
                    query_scale = query[partner, head].double().abs().max() / 7
                    position = context - query_tokens + row
                    near = torch.arange(context) <= position
                    near[sink : window * PAGE] = False
                    near_mass = exact[head, row, near].logsumexp(0)
                    integers = (query[row, head].double() / query_scale).round()
                    for group in GROUPS:
                        rest = inside[group] - mean
                        key_scale = rest.abs().max() / 7
                        score = (rest / key_scale).round() @ integers * key_scale * query_scale
                        score = (score + mean @ query[row, head].double()) * SCALE
                        best = max(best, float((score - near_mass).max()))
                passing[head, block, page] = best
    return passing


def test_s4_the_4_bit_map_is_the_papers(generator: torch.Generator) -> None:
    """The map by integers, with one value of a level a group, equals the one by dequantised keys."""
    heads, kv_heads, query_tokens, context = 2, 1, 70, 300
    data = oracle.random_paged(PLAIN, generator, [context], kv_heads, 16, 32)
    query = oracle.random_tensor(PLAIN, generator, query_tokens, heads, 16, spread=3)
    passing = transcription(query, data, 32, 64, 64)
    middle = passing.isfinite()
    # About half of each head's pages pass.
    log_tau = torch.stack([passing[head][middle[head]].median() for head in range(heads)]).float()
    passing -= log_tau.double()[:, None, None]
    kept = reference.kept_map(
        query, data.reader(0), SCALE, log_tau,
        LowBitScoring(bits=4, page_bounds=False, sink_tokens=32, local_tokens=64, query_block_tokens=64),
    )  # fmt: skip
    # The method lowers the bar a little for float32, and an integer flips where a quotient is near a half.
    sure = middle & (passing.abs() > 0.01)
    assert torch.equal(kept[sure], passing[sure] > 0)
    assert bool(kept[~middle].all())


def test_no_matrix_of_scores_is_held() -> None:
    """At 128K, neither ``[query_tokens, context]`` scores nor a float copy of the keys."""
    head_size = 16
    query = torch.randn(256, 1, head_size).bfloat16()
    with Largest() as largest:
        reference.kept_map(
            query, long_keys(CONTEXT, head_size), SCALE, torch.tensor([3.0]),
            LowBitScoring(bits=8, page_bounds=True, sink_tokens=32, local_tokens=128, query_block_tokens=64),
        )  # fmt: skip
    assert 0 < largest.bytes <= 256 * CONTEXT * 4 // 16
