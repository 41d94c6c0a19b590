"""Roles of tokentopk's layers; the matrix has its lists, tests/kernels its kernels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.methods.token_topk import TokenTopk
from vllm_sparse.step.roles import Role


@given(st.integers(2, 40), st.data())
def test_layers_choose_or_read_the_list_before_them(num_layers: int, data: st.DataObject) -> None:
    dense = data.draw(st.integers(0, num_layers - 1))
    later = range(dense + 1, num_layers)
    reuse = data.draw(st.lists(st.sampled_from(later))) if later else []
    roles = TokenTopk(dense_layers=dense, reuse_layers=tuple(reuse)).layer_roles(num_layers)
    assert len(roles) == num_layers
    for layer, role in enumerate(roles):
        expected = Role.DENSE if layer < dense else Role.READ if layer in reuse else Role.WRITE_AND_READ
        assert role is expected, layer


@pytest.mark.parametrize("layer", [0, 2, 32, -1])
def test_layers_without_a_list_before_them_are_refused(layer: int) -> None:
    method = TokenTopk(dense_layers=2, reuse_layers=(9, layer))
    with pytest.raises(KnobError, match=r"chooses first in layer 2, so layers 3 to 31"):
        method.layer_roles(32)


def test_equal_sets_of_layers_are_equal_settings() -> None:
    assert TokenTopk(reuse_layers=(9, 4, 9)) == TokenTopk(reuse_layers=(4, 9))
