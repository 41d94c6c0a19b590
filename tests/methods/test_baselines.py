"""`random` and `oracle`: lists of one length, chosen blindly and with the exact attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import oracle
from tests.methods.lists import SCALE, same_lists
from tests.oracle import PLAIN, Paged
from vllm_sparse.kernels.top_tokens import reference as top_tokens_reference
from vllm_sparse.methods import random_pages
from vllm_sparse.methods.baseline import PAGE_TOKENS, PrefillBaseline
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.oracle import Oracle, OracleDecode
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.methods.random_pages import UNIT_TOKENS, RandomDecode, RandomPages, hashed
from vllm_sparse.pages import page_mask
from vllm_sparse.step.roles import Role
from vllm_sparse.step.rows import DecodeRows, RowsPlace, TokenLists

HEADS, KV_HEADS, CONTEXT = 4, 2, 1500


@pytest.fixture
def data(generator: torch.Generator) -> Paged:
    return oracle.random_paged(PLAIN, generator, [CONTEXT], KV_HEADS, 32, 64)


@pytest.fixture
def query(generator: torch.Generator) -> torch.Tensor:
    return oracle.random_tensor(PLAIN, generator, CONTEXT, HEADS, 32, spread=3)


def prompt_map(
    method: PrefillBaseline, data: Paged, query: torch.Tensor, start: int, stop: int, layer: Layer
) -> torch.Tensor:
    """Pages of 32 tokens that a prompt chunk's lists hold: bool ``[heads, query_blocks, pages]``."""
    keys = PLAIN.keys_of(data.kv_cache, data.block_table[0], stop)
    chunk = query[start:stop]
    lists = method.select(chunk, keys, SCALE, PAGE_TOKENS, layer)
    heads = method.list_heads(chunk.shape[1], KV_HEADS)
    mask = page_mask(lists, -(-stop // PAGE_TOKENS))
    return mask.view(heads, -1, mask.shape[1])


def step_map(
    method: RandomDecode | OracleDecode, data: Paged, query: torch.Tensor, context: int, layer: int = 0
) -> torch.Tensor:
    """Tokens that a step's lists hold: bool ``[kv_heads, context]``."""
    keys = PLAIN.keys_of(data.kv_cache, data.block_table[0], context)
    lists = method.select(query[context - 1], keys, SCALE, 1, LayerMemory(layer=layer))
    return page_mask(lists, context)


@pytest.mark.parametrize("method", [RandomPages(density=0.3), Oracle(density=0.3, query_block_tokens=64)], ids=repr)
def test_a_prompt_chooses_the_same_for_every_chunking(
    method: PrefillBaseline, data: Paged, query: torch.Tensor
) -> None:
    block = method.query_block_tokens
    whole = prompt_map(method, data, query, 0, CONTEXT, Layer(2, 0))
    for start, stop in ((0, 512), (512, 1280), (1280, CONTEXT)):
        part = prompt_map(method, data, query, start, stop, Layer(2, 0))
        expected = whole[:, start // block : -(-stop // block), : part.shape[2]]
        assert torch.equal(part, expected), f"{start} to {stop}"


@pytest.mark.parametrize("method", [RandomPages, Oracle])
@pytest.mark.parametrize(
    ("density", "sink", "recent", "block"), [(0.3, 128, 128, 128), (0.1, 0, 0, 64), (0.55, 40, 300, 128)]
)
def test_lists_have_the_length_of_their_density(
    method: type[PrefillBaseline], density: float, sink: int, recent: int, block: int, data: Paged, query: torch.Tensor
) -> None:
    """In pages: sink, window and own tokens, then as many others as the density asks for."""
    made = method(density, sink, recent, 0, block)  # type: ignore[arg-type]
    kept = prompt_map(made, data, query, 0, CONTEXT, Layer(0, 0))
    for row, first in enumerate(range(0, CONTEXT, block)):
        last = min(first + block, CONTEXT) - 1
        forced = {page for page in range(-(-sink // PAGE_TOKENS)) if page * PAGE_TOKENS <= last}
        forced |= set(range(max(first - recent, 0) // PAGE_TOKENS, last // PAGE_TOKENS + 1))
        assert bool(kept[:, row, sorted(forced)].all())
        wanted = -(-(last + 1) * density // PAGE_TOKENS)
        assert kept[:, row].sum(1).tolist() == [max(wanted, len(forced))] * HEADS


def test_random_differs_between_layers_heads_and_query_blocks(data: Paged, query: torch.Tensor) -> None:
    method = RandomPages(density=0.5, sink_tokens=0, recent_tokens=0)
    kept = [prompt_map(method, data, query, 0, CONTEXT, Layer(layer, 0)) for layer in range(2)]
    assert torch.equal(kept[0], prompt_map(method, data, query * 2, 0, CONTEXT, Layer(0, 0))), "it looks at nothing"
    assert not torch.equal(kept[0][:, -1], kept[1][:, -1])
    assert not torch.equal(kept[0][0, -1], kept[0][1, -1])
    assert not torch.equal(kept[0][:, -1, :40], kept[0][:, -2, :40])
    # A rank of a tensor-parallel server chooses for its heads as the whole model would.
    part = prompt_map(method, data, query[:, 2:], 0, CONTEXT, Layer(0, 2))
    assert torch.equal(part, kept[0][2:])


def test_random_lists_are_stable_over_steps(data: Paged, query: torch.Tensor) -> None:
    method = RandomDecode(budget_tokens=256, sink_tokens=16, recent_tokens=64)
    before = step_map(method, data, query, 1000)
    for context in range(1001, 1400, 7):
        kept = step_map(method, data, query, context)
        # The recent tokens begin in another page, or lie in one page more or less.
        changed = (kept[:, : before.shape[1]] ^ before)[:, : before.shape[1] - 64 - 2 * UNIT_TOKENS]
        assert bool((changed.sum(1) <= 2 * UNIT_TOKENS).all()), f"context {context}"
        before = kept
    assert not torch.equal(*(step_map(method, data, query, 1400, layer) for layer in range(2)))
    assert not torch.equal(*before.unbind(0)), "KV heads read other pages"


def test_random_rows_of_a_step_choose_as_one_request(
    data: Paged, query: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each row's knobs, in a layer that is not the first."""
    monkeypatch.setattr(random_pages, "top_tokens", top_tokens_reference.top_tokens)
    method = RandomDecode(budget_tokens=256)
    contexts, knobs = [900, 1500, 0], [method, replace(method, budget_tokens=100, sink_tokens=0), method]
    seq_lens = torch.tensor(contexts, dtype=torch.int32)
    table = data.block_table[0].expand(3, -1)
    rows = DecodeRows(query[:3], data.kv_cache, table, seq_lens, SCALE)
    zeros = torch.zeros(3, dtype=torch.int32)
    place = RowsPlace(torch.zeros(3, dtype=torch.int64), 0, zeros, zeros, zeros, 5, None, None)
    lists = TokenLists(torch.zeros(3 * KV_HEADS, 300, dtype=torch.int32), torch.zeros(3 * KV_HEADS, dtype=torch.int32))
    method.choose_rows(rows, torch.tensor([made.row_knobs() for made in knobs], dtype=torch.int32), place, lists)
    for row, (context, made) in enumerate(zip(contexts[:2], knobs, strict=False)):
        for head, kept in enumerate(step_map(made, data, query, context, layer=5)):
            position = kept.nonzero().flatten()
            slots = (data.block_table[0][position // 64] * KV_HEADS + head) * 64 + position % 64
            entry = row * KV_HEADS + head
            assert int(lists.kept_tokens[entry]) == len(position)
            assert torch.equal(lists.slots[entry, : len(position)], slots.int())
    assert lists.kept_tokens[-KV_HEADS:].tolist() == [0] * KV_HEADS


def test_hashes_are_evenly_spread_and_differ_in_every_number() -> None:
    numbers = torch.arange(300)
    found = hashed(3, numbers.view(-1, 1), numbers)
    assert float(found.min()) >= 0
    assert float(found.max()) < 1
    share = torch.histc(found, 20, 0, 1) / found.numel()
    assert bool((share - 0.05).abs().max() < 0.005)
    # As often as of independent numbers: neighbours in either direction, and seeds.
    others = [found.roll(1, 0), found.roll(1, 1), found.T, hashed(4, numbers.view(-1, 1), numbers)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([found.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.02


@pytest.mark.parametrize("list_per", ["query_head", "kv_head"])
def test_oracle_reads_the_pages_of_most_mass(list_per: str, data: Paged, query: torch.Tensor) -> None:
    method = Oracle(density=0.3, sink_tokens=0, recent_tokens=0, list_per=list_per)  # type: ignore[arg-type]
    kept = prompt_map(method, data, query, 0, CONTEXT, Layer(0, 0))
    weight = oracle.probabilities(query, data.keys[0], SCALE, oracle.causal_mask(CONTEXT, CONTEXT))
    pages = -(-CONTEXT // PAGE_TOKENS)
    by_page = torch.nn.functional.pad(weight, (0, -CONTEXT % PAGE_TOKENS)).view(HEADS, CONTEXT, pages, -1).sum(3)
    for row, first in enumerate(range(0, CONTEXT, 128)):
        stop = min(first + 128, CONTEXT)
        own = list(range(first // PAGE_TOKENS, (stop - 1) // PAGE_TOKENS + 1))
        mass = by_page[:, first:stop].sum(1)
        mass[:, own] = float("inf")
        count = max(-int(-stop * 0.3 // PAGE_TOKENS), len(own))
        best = torch.zeros(HEADS, pages, dtype=torch.bool)
        best.scatter_(1, mass.topk(count, dim=1).indices, True)
        if list_per == "kv_head":
            best = best.view(KV_HEADS, -1, pages).any(1)
        assert torch.equal(kept[:, row], best), f"query block {row}"


@pytest.mark.parametrize("page", [1, 48, 64])
def test_oracle_decodes_with_the_most_mass(page: int, data: Paged, query: torch.Tensor) -> None:
    """Summed over the query heads of a KV head and the tokens of a page."""
    method = OracleDecode(budget_tokens=200, sink_tokens=0, recent_tokens=0)
    lists = method.select(query[-1], data.reader(0), SCALE, page, LayerMemory())
    weight = oracle.probabilities(query[-1:], data.keys[0], SCALE, torch.ones(CONTEXT, dtype=torch.bool))[:, 0]
    mass = torch.nn.functional.pad(weight.view(KV_HEADS, -1, CONTEXT).sum(1), (0, -CONTEXT % page))
    mass = mass.view(KV_HEADS, -1, page).sum(2)
    mass[:, -1] = float("inf")
    best = torch.zeros(mass.shape, dtype=torch.bool).scatter_(1, mass.topk(-(-200 // page), dim=1).indices, True)
    assert torch.equal(page_mask(lists, mass.shape[1]), best)


@pytest.mark.parametrize("method", [RandomDecode, OracleDecode])
def test_every_sparse_layer_has_a_list_of_its_own(method: type[RandomDecode | OracleDecode]) -> None:
    assert method().layer_roles(3) == [Role.WRITE_AND_READ] * 3
    assert method(dense_layers=2).layer_roles(3) == [Role.DENSE, Role.DENSE, Role.WRITE_AND_READ]
    assert method(dense_layers=9).layer_roles(3) == [Role.DENSE] * 3
    with pytest.raises(ValueError, match="100 tokens do not hold sink_tokens 60"):
        method(budget_tokens=100, sink_tokens=60)


def test_heads_are_merged_by_the_sum_of_their_probabilities(data: Paged) -> None:
    """Two tokens: one that a single head attends to, and one that both attend to half as much each, and a bit more."""
    keys = torch.zeros(1, 64, 32)
    keys[0, 5, 0], keys[0, 9, 1], keys[0, 9, 2] = 8.0, 7.5, 7.5
    query = torch.zeros(2, 32)
    query[0, 0], query[0, 1], query[1, 2] = 1.0, 1.0, 1.0
    one = oracle.paged(PLAIN, [keys], [keys], 64, torch.Generator().manual_seed(0))
    method = OracleDecode(budget_tokens=16, sink_tokens=0, recent_tokens=15)
    lists = method.select(query, one.reader(0), 1.0, 1, LayerMemory())
    assert lists.pages[0, 0] == 9
    assert same_lists(lists, method.select(query.flip(0), one.reader(0), 1.0, 1, LayerMemory()))
