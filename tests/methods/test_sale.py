"""SALE: the properties S1 to S10 of the notes (the quantisers' own, S4 and S5, are tests of the kernel)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.methods.lists import FIRST_LAYER, SCALE, attend_chunk, chunk_allowed, select_chunk
from tests.oracle import EXECUTING, PLAIN, SELECTING, Paged, Platform
from vllm_sparse.kernels.low_bit_scores import reference
from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.sale.thresholds import Calibration

PAGE = 32
CHUNKS = [(64, 64), (1000, 1000), (512, 1024), (300, 1000), (257, 1153), (129, 700), (1, 700)]
HEAD_SIZE = 32
# float32 and its allowances move a threshold by less than this, in nats.
SLACK = 0.01
EVERY_WAY = [
    pytest.param({"bits": bits, "page_bounds": bounds}, id=f"{bits}-bits-{'' if bounds else 'no-'}bounds")
    for bits in (8, 4)
    for bounds in (True, False)
]


def peaked(
    platform: Platform, generator: torch.Generator, chunk: int, context: int, heads: int = 4, kv_heads: int = 2
) -> tuple[torch.Tensor, Paged]:
    """A request with pages that all, some and no rows attend to."""
    keys = oracle.random_tensor(platform, generator, kv_heads, context, HEAD_SIZE)
    query = oracle.random_tensor(platform, generator, chunk, heads, HEAD_SIZE, spread=1.5)
    keys[:, torch.randint(0, context, (context // 100 + 1,), generator=generator)] += 1
    query += 1
    some = torch.randint(0, context, (chunk // 10 + 1,), generator=generator)
    rows = torch.randint(0, chunk, (chunk // 10 + 1,), generator=generator)
    query[rows] += 2 * keys[:, some].transpose(0, 1).repeat_interleave(heads // kv_heads, dim=1)
    return query, oracle.paged(
        platform, [keys], [oracle.random_tensor(platform, generator, *keys.shape)], 64, generator
    )


def kept(method: Sale, query: torch.Tensor, data: Paged) -> torch.Tensor:
    """Map of the kept pages that are in reach: bool ``[heads, blocks, pages]``."""
    mask = method.block_mask(query, data.reader(0), SCALE, FIRST_LAYER).cpu()
    chunk, context = query.shape[0], data.keys[0].shape[1]
    last = (torch.arange(context - chunk, context, method.query_block_tokens) + method.query_block_tokens - 1).clamp(
        max=context - 1
    )
    return mask & (torch.arange(mask.shape[2]) * PAGE <= last.unsqueeze(1))


def near(method: Sale, chunk: int, context: int) -> torch.Tensor:
    """Sink and local window: bool ``[blocks, pages]``."""
    pages = torch.arange(-(-context // PAGE))
    rows = []
    for first in range(context - chunk, context, method.query_block_tokens):
        last = min(first + method.query_block_tokens, context) - 1
        start = max(min(last + 1 - method.recent_tokens, first), 0) // PAGE
        rows.append(((pages < method.sink_tokens // PAGE) | (pages >= start)) & (pages * PAGE <= last))
    return torch.stack(rows)


def at(method: Sale, shift: float) -> Sale:
    """The method with its threshold moved, in nats."""
    assert method.tau is not None
    return dataclasses.replace(method, tau=method.tau * math.exp(shift))


def assert_equal_up_to_rounding(method: Sale, mask: torch.Tensor, query: torch.Tensor, data: Paged, what: str) -> None:
    """The mask lies between those of a threshold a little higher and a little lower."""
    few, many = kept(at(method, SLACK), query, data), kept(at(method, -SLACK), query, data)
    assert bool((mask | ~few).all()), f"{what}: pages are missing"
    assert bool((many | ~mask).all()), f"{what}: pages too many"


@pytest.mark.parametrize("platform", EXECUTING)
@pytest.mark.parametrize("setting", EVERY_WAY)
def test_s1_a_tau_of_0_is_dense(platform: Platform, setting: dict[str, Any], generator: torch.Generator) -> None:
    method = Sale(tau=0, **setting)
    assert method.exactly_dense
    for chunk, context in CHUNKS[1:4]:
        query, data = peaked(platform, generator, chunk, context)
        causal = oracle.causal_mask(chunk, context)
        lists = select_chunk(method, data, 0, query, platform.page_sizes(64)[0])
        assert torch.equal(chunk_allowed(method, lists, data, 0, query), causal.expand(4, -1, -1))
        dense = oracle.attention(query, data.keys[0], data.values[0], SCALE, causal)
        oracle.assert_close(attend_chunk(method, lists, data, 0, query), dense)


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("setting", EVERY_WAY)
@pytest.mark.parametrize(("sink", "local", "query_block"), [(32, 128, 64), (96, 0, 64), (64, 100, 128)])
def test_s1_and_s2_a_huge_tau_keeps_sink_and_local_window_and_nothing_else(
    platform: Platform, setting: dict[str, Any], sink: int, local: int, query_block: int, generator: torch.Generator
) -> None:
    method = Sale(tau=1e6, sink_tokens=sink, recent_tokens=local, query_block_tokens=query_block, **setting)  # type: ignore[arg-type]
    for chunk, context in CHUNKS:
        query, data = peaked(platform, generator, chunk, context, 2, 1)
        query = query / 4
        expected = near(method, chunk, context).expand(2, -1, -1)
        assert torch.equal(kept(method, query, data), expected), f"{chunk} of {context}"
        lists = select_chunk(method, data, 0, query, PAGE)
        allowed = chunk_allowed(method, lists, data, 0, query)
        for row in range(0, chunk, 97):
            position = context - chunk + row
            assert bool(allowed[:, row, max(position - local + query_block, 0) : position + 1].all())
            assert bool(allowed[:, row, : min(sink, position + 1)].all())


def hostile(generator: torch.Generator, kind: str, chunk: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one head that are hard to quantise or to bound."""
    query = torch.randn(chunk, 1, HEAD_SIZE, generator=generator) * 3
    keys = torch.randn(1, context, HEAD_SIZE, generator=generator)
    if kind == "outlier channels":
        # One channel sets every scale; the others, which the queries look at, become a level or none.
        keys[:, :, 0] *= 300
        query[:, :, 0] = 0
    elif kind == "outlier tokens":
        # One token of a group sets the scale of its neighbours and lies across the queries.
        keys[:, ::16] = 0
        keys[:, ::16, 0] = 400
        query[:, :, 0] = 0
    elif kind == "far mean":
        # Close to one another and far from 0.
        keys = keys * 0.3 + 40 * torch.randn(1, 1, HEAD_SIZE, generator=generator)
    elif kind == "one key":
        # All of a row's attention may lie in one key far back.
        keys *= 0.1
        rows = torch.randint(0, chunk, (20,), generator=generator)
        keys[0, torch.randint(0, context, (20,), generator=generator)] = query[rows, 0] * 0.7
    elif kind == "outlier query":
        # A partner row sets the scale of a row.
        query[8::16] *= 100
    return query, keys


KINDS = ["plain", "outlier channels", "outlier tokens", "far mean", "one key", "outlier query"]


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 1 << 30),
    chunk=st.sampled_from([64, 130, 200]),
    before=st.integers(300, 600),
    anchored=st.booleans(),
    bounds=st.booleans(),
    query_block=st.sampled_from([64, 128]),
    local=st.sampled_from([0, 64, 128]),
)
def test_s3_no_key_with_a_probability_of_tau_is_dropped(
    kind: str, seed: int, chunk: int, before: int, anchored: bool, bounds: bool, query_block: Any, local: int
) -> None:
    """Tau is the largest probability of one page, so that one key of one row just reaches it and no other helps.

    Where the sink has next to all attention, that key's relative score is its probability and there is no room left.
    """
    generator = torch.Generator().manual_seed(seed)
    context = before + chunk
    query, keys = hostile(generator, kind, chunk, context)
    if anchored:
        keys[:, :, 1] = 0
        query[:, :, 1] = 3
        keys[:, 0] = 0
        keys[:, 0, 1] = 12 / SCALE
    data = oracle.paged(PLAIN, [keys], [keys], 32, generator)
    probability = oracle.probabilities(query, keys, SCALE, oracle.causal_mask(chunk, context))
    page = int(torch.randint(1, before // PAGE - 4, (), generator=generator))
    tau = float(probability[:, :query_block, page * PAGE : (page + 1) * PAGE].max())
    if tau == 0:
        return
    method = Sale(tau=tau, page_bounds=bounds, query_block_tokens=query_block, recent_tokens=local)
    allowed = chunk_allowed(method, select_chunk(method, data, 0, query, PAGE), data, 0, query)
    lost = (probability >= tau) & ~allowed
    assert not bool(lost.any()), f"{int(lost.sum())} keys lost, of probabilities {probability[lost].tolist()[:5]}"


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("bounds", [True, False])
def test_s3_8_bits_keep_little_more_than_exact_scores_would(
    platform: Platform, bounds: bool, generator: torch.Generator
) -> None:
    """Each kept page holds a key whose exact score is above the threshold less twice what rounding may hide."""
    chunk, context = 300, 1100
    query, data = peaked(platform, generator, chunk, context)
    method = Sale(tau=0.4, page_bounds=bounds)
    mask = kept(method, query, data)
    scores = torch.einsum("qhd,hkd->hqk", query.double().cpu(), oracle.expand(data.keys[0], 4)) * SCALE
    scores.masked_fill_(~oracle.causal_mask(chunk, context), -math.inf)
    forced = near(method, chunk, context)
    always = forced.repeat_interleave(64, 0)[:chunk].repeat_interleave(PAGE, 1)[:, :context]
    above = scores - scores.masked_fill(~always, -math.inf).logsumexp(2, keepdim=True) - math.log(0.4)
    above = torch.nn.functional.pad(above, (0, -context % PAGE, 0, -chunk % 64), value=-math.inf)
    best = above.view(4, -1, 64, mask.shape[2], PAGE).amax((2, 4))
    middle = ~forced & (torch.arange(mask.shape[2]) < near(method, chunk, context).shape[1])
    assert bool(mask[:, middle & ~forced].any())
    assert not bool(mask[:, middle & ~forced].all())
    assert bool((mask | (best <= 0)).all()), "a page whose exact score passes is missing"
    assert bool((~mask | forced | (best > -0.3)).all()), "a page far below the threshold is kept"


@pytest.mark.parametrize("setting", EVERY_WAY)
def test_s6_a_vector_added_to_all_keys_changes_nothing(setting: dict[str, Any], generator: torch.Generator) -> None:
    """Keys on a grid, so that means are exact and the same remains after they are removed."""
    chunk, context = 300, 1000
    query, data = peaked(PLAIN, generator, chunk, context)
    grid = (data.keys[0] * 8).round() / 8
    shift = torch.randint(-40, 40, (2, 1, HEAD_SIZE), generator=generator) / 8
    method = Sale(tau=0.4, **setting)
    first = oracle.paged(PLAIN, [grid], [grid], 32, generator)
    second = oracle.paged(PLAIN, [grid + shift], [grid], 32, generator)
    if setting["bits"] == 8 or setting["page_bounds"]:
        # Allowances for float32 grow with the keys.
        assert_equal_up_to_rounding(method, kept(method, query, second), query, first, "shifted")
    assert_equal_up_to_rounding(method, kept(method, query, first), query, second, "shifted back")


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("setting", EVERY_WAY)
def test_s8_a_smaller_tau_keeps_more(platform: Platform, setting: dict[str, Any], generator: torch.Generator) -> None:
    query, data = peaked(platform, generator, 300, 1100)
    maps = [kept(Sale(tau=tau, **setting), query, data) for tau in (0, 0.05, 0.2, 0.4, 0.8, 3, 1e6)]
    for more, fewer in itertools.pairwise(maps):
        assert bool((more | ~fewer).all())
    assert len({int(mask.sum()) for mask in maps}) >= 5


@pytest.mark.parametrize("platform", SELECTING)
def test_page_bounds_drop_only_what_exact_scores_would(platform: Platform, generator: torch.Generator) -> None:
    query, data = peaked(platform, generator, 300, 1100)
    method = Sale(tau=0.4)
    bounded = kept(method, query, data)
    scored = kept(dataclasses.replace(method, page_bounds=False), query, data)
    assert bool((scored | ~bounded).all())


def test_page_bounds_spare_scores(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of equal keys are decided by their mean, kept or not, but for those within rounding of the threshold."""
    chunk, context = 256, 2048
    keys = torch.randn(1, context // PAGE, HEAD_SIZE, generator=generator).repeat_interleave(PAGE, 1)
    query = torch.randn(chunk, 1, HEAD_SIZE, generator=generator) * 3
    data = oracle.paged(PLAIN, [keys], [keys], 64, generator)
    scored = []
    products = reference.integer_products

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        scored.append(left.shape[0])
        return products(left, right)

    monkeypatch.setattr(reference, "integer_products", counted)
    without = kept(Sale(tau=0.3, page_bounds=False), query, data)
    assert sum(scored) == context - 128 - PAGE
    scored.clear()
    mask = kept(Sale(tau=0.3), query, data)
    assert sum(scored) <= 4 * PAGE
    assert torch.equal(mask, without)
    assert 0 < float(mask[..., 1:40].float().mean()) < 1


@pytest.mark.parametrize("setting", EVERY_WAY)
def test_s9_thresholds_come_from_sink_and_local_window_only(
    setting: dict[str, Any], generator: torch.Generator
) -> None:
    """A page in the middle, however large its scores, changes no other page's fate."""
    chunk, context = 256, 1024
    query, data = peaked(PLAIN, generator, chunk, context)
    changed = data.keys[0].clone()
    changed[:, 10 * PAGE : 11 * PAGE] *= 30
    other = oracle.paged(PLAIN, [changed], data.values, 64, generator)
    method = Sale(tau=0.4, **setting)
    before, after = kept(method, query, data), kept(method, query, other)
    assert bool(after[..., 10].all())
    before[..., 10] = after[..., 10] = False
    assert torch.equal(before, after)


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("setting", EVERY_WAY)
def test_s10_chunks_from_multiples_of_the_query_block_choose_as_a_whole_prompt(
    platform: Platform, setting: dict[str, Any], generator: torch.Generator
) -> None:
    context = 700
    query, data = peaked(platform, generator, context, context)
    method = Sale(tau=0.4, **setting)
    few, many = (kept(at(method, shift), query, data) for shift in (SLACK, -SLACK))
    for starts in ([0, 512], [0, 64, 448, 640]):
        for start, stop in zip(starts, [*starts[1:], context], strict=True):
            part = Paged(platform, data.kv_cache, data.block_table, [data.keys[0][:, :stop]], data.values)
            mask = kept(method, query[start:stop], part)
            blocks = slice(start // 64, -(-stop // 64))
            pages = mask.shape[2]
            assert bool((mask | ~few[:, blocks, :pages]).all()), f"{start} to {stop}"
            assert bool((many[:, blocks, :pages] | ~mask).all()), f"{start} to {stop}"
            assert not bool(few[:, blocks, pages:].any())


def test_calibrated_thresholds_are_those_of_the_layer_and_the_processs_heads(
    tmp_path: Any, generator: torch.Generator
) -> None:
    """Of the second of two processes here; a tau in the request wins."""
    query, data = peaked(PLAIN, generator, 256, 1024, heads=2, kv_heads=1)
    thresholds = [[1e6, 1e6, 1e6, 1e6], [1e6, 1e6, 0.0, 0.4]]
    path = tmp_path / "thresholds.json"
    Calibration("some model", 2, 4, 0.05, [4096], thresholds).save(path)
    method = Sale(calibration=str(path))
    assert not method.exactly_dense
    mask = method.block_mask(query, data.reader(0), SCALE, Layer(1, 2))
    assert bool(mask[0].all())
    assert torch.equal(mask[1], Sale(tau=0.4).block_mask(query, data.reader(0), SCALE, FIRST_LAYER)[1])
    overridden = dataclasses.replace(method, tau=0.2)
    assert torch.equal(
        overridden.block_mask(query, data.reader(0), SCALE, Layer(1, 2)),
        Sale(tau=0.2).block_mask(query, data.reader(0), SCALE, FIRST_LAYER),
    )
    for layer in (Layer(2, 0), Layer(1, 3)):
        with pytest.raises(ValueError, match=r"thresholds.json holds thresholds of 2 layers of 4 query heads"):
            method.block_mask(query, data.reader(0), SCALE, layer)
    with pytest.raises(KnobError, match="2 layers of 4 query heads, of some model; the model has 3 layers of 8"):
        method.check_defaults(3, 8)
    method.check_defaults(2, 4)
