"""The guard of a request: which layers it sends dense, and what the others still read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.step.guard import RequestGuard, guarded_roles
from vllm_sparse.step.roles import Role

D, DW, R, WR = Role.DENSE, Role.DENSE_AND_WRITE, Role.READ, Role.WRITE_AND_READ

# A layer that reads a list follows one that wrote it.
role_tuples = (
    st.lists(st.sampled_from(Role), min_size=1, max_size=12)
    .map(tuple)
    .filter(lambda roles: R not in roles[: next((i for i, role in enumerate(roles) if role.writes_list), len(roles))])
)


def sources(roles: tuple[Role, ...]) -> list[int | None]:
    """The layer whose list each layer reads; None where it reads everything."""
    last: int | None = None
    found = []
    for layer, role in enumerate(roles):
        last = layer if role.writes_list else last
        found.append(last if role.reads_list else None)
    return found


@given(role_tuples, st.frozensets(st.integers(0, 11)))
def test_dense_layers_read_everything_and_the_others_what_they_read_before(
    roles: tuple[Role, ...], dense: frozenset[int]
) -> None:
    guarded = guarded_roles(roles, dense)
    expected = [None if layer in dense else source for layer, source in enumerate(sources(roles))]
    assert sources(guarded) == expected
    writing = {layer for layer, role in enumerate(guarded) if role.writes_list}
    assert writing == {source for source in expected if source is not None}, "no list is written in vain"
    assert guarded_roles(guarded, dense) == guarded


def test_roles_of_known_methods() -> None:
    tidal = (D, DW, R, R, DW, R)
    assert guarded_roles(tidal, frozenset({2})) == (D, DW, D, R, DW, R)
    assert guarded_roles(tidal, frozenset({2, 3})) == (D, D, D, D, DW, R)
    one_list = (WR, R, R)
    assert guarded_roles(one_list, frozenset({0})) == (DW, R, R)
    assert guarded_roles(one_list, frozenset({0, 1, 2})) == (D, D, D)


def test_a_layer_below_the_floor_goes_dense_once() -> None:
    guard = RequestGuard(0.8)
    assert not guard.observe(3, 0.8)
    assert guard.dense_layers == frozenset()
    assert guard.observe(3, 0.79)
    assert not guard.observe(3, 0.1), "it is dense already"
    assert not guard.observe(3, 1.0)
    assert guard.dense_layers == {3}
    assert guard.observe(4, float("nan"))
    assert list(guard.sparse_layers(range(2, 6))) == [2, 5]


def test_layers_take_turns() -> None:
    guard = RequestGuard(0.8)
    reading = [2, 3, 5, 6, 7]
    assert [guard.take_turn(reading, 2, step) for step in range(3)] == [(2, 3), (5, 6), (7, 2)]
    assert (guard.layers_checked, guard.last_check) == (6, 2)
    # Layers that went dense are passed over.
    assert guard.take_turn([2, 6], 2, 3) == (6, 2)
    assert guard.take_turn([6], 2, 4) == (6,)
