"""TidalDecode: the properties T1 to T7 of the notes that concern its lists; the layers are in ``tests/backend``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.methods.lists import SCALE as EXECUTED_SCALE
from tests.methods.lists import attend_newest, same_lists
from tests.oracle import EXECUTING, PLAIN, SELECTING, Paged, Platform
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.roles import Role

SCALE = 0.15


def kept(method: Tidal, query: torch.Tensor, data: Paged, page: int = 1, scale: float = SCALE) -> list[set[int]]:
    """Token positions of each list."""
    lists = method.select(query, data.reader(0), scale, page, LayerMemory())
    context = data.keys[0].shape[1]
    return [
        set(oracle.kept_positions(lists, row, context).nonzero().flatten().tolist())
        for row in range(lists.pages.shape[0])
    ]


def ranked(scores: torch.Tensor) -> list[int]:
    """Positions by falling score, ties to the lower position."""
    return sorted(range(scores.shape[0]), key=lambda position: (-float(scores[position]), position))


def logits(query: torch.Tensor, data: Paged) -> torch.Tensor:
    """Float64 ``[query_heads, context]``."""
    return torch.einsum("hd,hkd->hk", query.double().cpu(), oracle.expand(data.keys[0], query.shape[0]))


def faithful(budget: int, lists: str = "query_head", **knobs: int) -> Tidal:
    return Tidal(budget_tokens=budget, list_per=lists, **{"sink_tokens": 0, "recent_tokens": 0, **knobs})  # type: ignore[arg-type]


@pytest.mark.parametrize("platform", EXECUTING)
@pytest.mark.parametrize("lists", ["kv_head", "query_head"])
@pytest.mark.parametrize("context", [16, 100, 129])
def test_t1_a_budget_of_the_context_is_dense(
    platform: Platform, lists: str, context: int, generator: torch.Generator
) -> None:
    data = oracle.random_paged(platform, generator, [context], 2, 64, 32)
    query = oracle.random_tensor(platform, generator, 8, 64)
    everything = torch.ones(context, dtype=torch.bool)
    dense = oracle.attention(query.unsqueeze(0), data.keys[0], data.values[0], EXECUTED_SCALE, everything)
    for page in platform.page_sizes(32):
        chosen = faithful(context, lists).select(query, data.reader(0), SCALE, page, LayerMemory())
        assert chosen.kept_tokens.tolist() == [context] * chosen.pages.shape[0]
        oracle.assert_close(attend_newest(chosen, data, 0, query), dense[0])


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("context", [17, 129, 1000, 4099])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1)])
def test_t3_the_list_holds_the_largest_scores(
    platform: Platform, context: int, heads: int, kv_heads: int, generator: torch.Generator
) -> None:
    """The newest token and the budget's largest others, per query head; exact ties may go either way here."""
    data = oracle.random_paged(platform, generator, [context], kv_heads, 32, 64)
    query = oracle.random_tensor(platform, generator, heads, 32)
    budget = min(context, 64)
    scores = logits(query, data)
    for head, tokens in enumerate(kept(faithful(budget), query, data)):
        assert len(tokens) == budget
        assert context - 1 in tokens
        others = tokens - {context - 1}
        expected = [position for position in ranked(scores[head]) if position != context - 1][: budget - 1]
        if others != set(expected):
            # Only entries within float32 rounding of the cut may differ.
            cut = float(scores[head, expected[-1]])
            apart = [float(scores[head, position]) - cut for position in others ^ set(expected)]
            assert max(map(abs, apart)) < 1e-4 * (1 + abs(cut)), apart


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("context", [100, 1000, 4099])
def test_t3_ties_go_to_the_lower_position(platform: Platform, context: int, generator: torch.Generator) -> None:
    """Integer keys and a zero query part: many exactly equal scores, on both sides of the cut."""
    keys = torch.randint(0, 2, (1, context, 32), generator=generator).to(platform.dtype).to(platform.device)
    keys[:, :, 1:] = 0
    data = oracle.paged(platform, [keys], [keys], 64, generator)
    query = torch.ones(1, 32, dtype=platform.dtype, device=platform.device)
    expected = [position for position in ranked(logits(query, data)[0]) if position != context - 1][:31]
    assert sorted(kept(faithful(32), query, data)[0]) == sorted([*expected, context - 1])


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("lists", ["kv_head", "query_head"])
def test_t3_a_sharp_head_still_ranks_its_small_scores(
    platform: Platform, lists: str, generator: torch.Generator
) -> None:
    """Probabilities that underflow float32 to 0 must not lose their order: softmax is monotone in the scores."""
    context, budget = 1000, 64
    # Distinct integer scores, one key per value, so that most probabilities underflow.
    keys = torch.zeros(1, context, 32)
    order = torch.randperm(context, generator=generator)
    keys[0, :, 0], keys[0, :, 1] = (order // 32).float(), (order % 32).float()
    keys = keys.to(platform.dtype).to(platform.device)
    data = oracle.paged(platform, [keys], [keys], 64, generator)
    query = torch.zeros(1, 32, dtype=platform.dtype, device=platform.device)
    query[0, 0], query[0, 1] = 32, 1
    expected = [position for position in ranked(logits(query, data)[0]) if position != context - 1][: budget - 1]
    assert kept(faithful(budget, lists), query, data, scale=4.0)[0] == {*expected, context - 1}


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("lists", ["kv_head", "query_head"])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_t5_forced_tokens_are_in_every_list(
    platform: Platform, lists: str, page: int, generator: torch.Generator
) -> None:
    """Even where the scores are against them."""
    context, sink, recent = 1000, 21, 37
    keys = oracle.random_tensor(platform, generator, 2, context, 32)
    keys[:, :sink] = -9
    keys[:, -recent:] = -9
    data = oracle.paged(platform, [keys], [keys], 64, generator)
    query = torch.ones(4, 32, dtype=platform.dtype, device=platform.device)
    forced = set(range(sink)) | set(range(context - recent, context))
    method = Tidal(budget_tokens=64, sink_tokens=sink, recent_tokens=recent, list_per=lists)  # type: ignore[arg-type]
    for tokens in kept(method, query, data, page):
        assert forced <= tokens
    for tokens in kept(faithful(64, lists), query, data):
        assert tokens & forced == {context - 1}, "without forcing only the newest token is certain"


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("page", [1, 16])
def test_t6_merged_lists_equal_per_head_lists_without_groups(
    platform: Platform, page: int, generator: torch.Generator
) -> None:
    data = oracle.random_paged(platform, generator, [777], 4, 32, 64)
    query = oracle.random_tensor(platform, generator, 4, 32)
    merged, single = (Tidal(budget_tokens=96, list_per=lists) for lists in ("kv_head", "query_head"))
    reader = data.reader(0)
    assert same_lists(*(method.select(query, reader, SCALE, page, LayerMemory()) for method in (merged, single)))


@pytest.mark.parametrize("platform", SELECTING)
def test_t6_heads_are_merged_by_probability(platform: Platform, generator: torch.Generator) -> None:
    """A head with large logits must not drown its neighbour, whose probabilities are the sharper ones."""
    context = 600
    data = oracle.random_paged(platform, generator, [context], 1, 32, 64)
    query = oracle.random_tensor(platform, generator, 2, 32, spread=2)
    # An offset common to all keys raises a head's logits and leaves its probabilities alone.
    data.keys[0][:, :, 0] = 8
    query[0, 0] = 50
    data = oracle.paged(platform, data.keys, data.values, 64, generator)
    everything = torch.ones(context, dtype=torch.bool)
    best = oracle.probabilities(query.unsqueeze(0), data.keys[0], SCALE, everything)[:, 0].amax(0)
    tokens = kept(faithful(40, "kv_head"), query, data)[0]
    others = tokens - {context - 1}
    threshold = sorted(best[:-1].tolist(), reverse=True)[38]
    assert all(float(best[position]) >= threshold * (1 - 1e-3) for position in others)


@pytest.mark.parametrize("platform", SELECTING)
@pytest.mark.parametrize("page", [16, 48])
def test_t7_a_page_is_worth_its_best_token(platform: Platform, page: int, generator: torch.Generator) -> None:
    """The page lists follow from the token scores by one rule, of which pages of one token are the special case."""
    context, budget = 1000, 192
    data = oracle.random_paged(platform, generator, [context], 1, 32, page)
    query = oracle.random_tensor(platform, generator, 1, 32)
    for size in (1, page):
        scores = [float(part.max()) for part in torch.split(logits(query, data)[0], size)]
        order = sorted(range(len(scores) - 1), key=lambda index: -scores[index])
        count = -(-budget // size)
        expected = sorted([*order[: count - 1], len(scores) - 1])
        lists = faithful(budget).select(query, data.reader(0), SCALE, size, LayerMemory())
        assert oracle.live_pages(lists, 0) == expected, f"pages of {size}"


@pytest.mark.parametrize(
    ("layers", "select"),
    [
        (32, {2, 5, 8, 11, 14, 17, 20, 23, 26, 29}),
        (24, {2, 5, 8, 11, 14, 17, 20}),
        (16, {2, 5, 8, 11, 14}),
        (8, {2, 5}),
        (4, {2}),
        (3, {2}),
    ],
)
def test_by_default_every_third_layer_selects_again(layers: int, select: set[int]) -> None:
    """A list of the last layer would serve none: in 24 layers, layer 23 reads that of layer 20."""
    roles = Tidal().layer_roles(layers)
    first = min(select)
    expected = [Role.DENSE] * first + [Role.WRITE_AND_READ if n in select else Role.READ for n in range(first, layers)]
    assert roles == expected


@given(layers=st.integers(3, 128))
def test_a_list_is_chosen_before_it_is_read(layers: int) -> None:
    roles = Tidal().layer_roles(layers)
    assert len(roles) == layers
    assert roles[0] is Role.DENSE
    assert set(roles) <= {Role.DENSE, Role.WRITE_AND_READ, Role.READ}
    assert Role.WRITE_AND_READ in roles
    if Role.READ in roles:
        assert roles.index(Role.WRITE_AND_READ) < roles.index(Role.READ)
    assert Role.DENSE not in roles[roles.index(Role.WRITE_AND_READ) :]


def test_the_papers_layers_are_a_knob() -> None:
    roles = Tidal(reselect_layers=(13,), selection_reads="everything").layer_roles(32)
    assert [layer for layer, role in enumerate(roles) if role is Role.DENSE_AND_WRITE] == [2, 13]
    assert [layer for layer, role in enumerate(roles) if role.writes_list and role.reads_list] == []


def test_every_third_layer_counts_from_the_first_that_selects() -> None:
    roles = Tidal(dense_layers=1).layer_roles(12)
    assert [layer for layer, role in enumerate(roles) if role.writes_list] == [1, 4, 7, 10]


def test_roles_follow_the_knobs() -> None:
    roles = Tidal(dense_layers=0, reselect_layers=(3, 5), selection_reads="everything").layer_roles(7)
    assert roles == [
        Role.DENSE_AND_WRITE, Role.READ, Role.READ, Role.DENSE_AND_WRITE, Role.READ, Role.DENSE_AND_WRITE, Role.READ,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "knob", "allowed"),
    [
        (Tidal(dense_layers=8), "dense_layers", "8 layers.* to 7 are allowed"),
        (Tidal(reselect_layers=(8,)), "reselect_layers", "8 layers.*layers 3 to 7 are allowed"),
        (Tidal(dense_layers=3, reselect_layers=(3,)), "reselect_layers", "layers 4 to 7 are allowed"),
        (Tidal(reselect_layers=(-1,)), "reselect_layers", "layers 3 to 7 are allowed"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(method: Tidal, knob: str, allowed: str) -> None:
    with pytest.raises(KnobError, match=allowed) as caught:
        method.layer_roles(8)
    assert caught.value.knob == knob


@given(budget=st.integers(16, 600), sink=st.integers(0, 300), recent=st.integers(0, 300), context=st.integers(1, 700))
def test_the_list_is_as_long_as_the_budget(budget: int, sink: int, recent: int, context: int) -> None:
    # The newest token is read even where no recent ones are.
    if sink + max(recent, 1) > budget:
        with pytest.raises(
            ValueError, match=f"{budget} tokens do not hold sink_tokens {sink} and recent_tokens {recent}"
        ):
            Tidal(budget_tokens=budget, sink_tokens=sink, recent_tokens=recent)
        return
    generator = torch.Generator().manual_seed(context)
    data = oracle.random_paged(PLAIN, generator, [context], 1, 16, 64)
    method = Tidal(budget_tokens=budget, sink_tokens=sink, recent_tokens=recent)
    tokens = kept(method, oracle.random_tensor(PLAIN, generator, 2, 16), data)[0]
    assert len(tokens) == min(context, budget)
