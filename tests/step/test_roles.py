"""Roles have one meaning on the host, on the device and in policy files."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.kernels.decode_roles import reference
from vllm_sparse.methods.tidal import Tidal, policy
from vllm_sparse.step.plan import layer_roles
from vllm_sparse.step.roles import Role, held_roles, reading_layers


def test_numbers_on_the_device_are_the_roles() -> None:
    numbers = {role.name: role.number for role in Role}
    assert numbers == {name: getattr(reference, name) for name in numbers}
    assert sorted(numbers.values()) == list(range(len(Role)))


@pytest.mark.parametrize("role", Role)
def test_a_role_reads_a_list_or_everything(role: Role) -> None:
    assert role.reads_everything != role.reads_list
    assert role.writes_list == ("write" in role.value)
    assert role.reads_list == ("read" in role.value)
    assert pickle.loads(pickle.dumps(role)) is role
    assert hash(role) == hash(role.value)


def test_reading_layers() -> None:
    assert reading_layers(tuple(Role)) == [2, 3]


def test_a_stage_chooses_its_own_list_where_another_stage_chose_the_one_to_read() -> None:
    tidal = Tidal(selection_reads="everything")
    assert [role.value for role in layer_roles(tidal, 8)] == [
        *("dense", "dense", "dense_and_write", "read", "read", "dense_and_write", "read", "read")
    ]
    stages = [layer_roles(tidal, 8, held) for held in (range(3), range(3, 6), range(6, 8))]
    dense, read, choose = Role.DENSE, Role.READ, Role.WRITE_AND_READ
    assert stages == [
        # Nobody here reads what layers 2 and 5 would choose.
        (dense,) * 8,
        (dense, dense, dense, choose, read, dense, dense, dense),
        (*(dense,) * 6, choose, read),
    ]
    assert held_roles((dense, choose, dense, read), range(2, 4)) == (dense, dense, dense, choose)


@given(st.lists(st.sampled_from(Role), min_size=1, max_size=12), st.lists(st.integers(0, 12), max_size=3))
def test_no_list_leaves_its_stage(drawn: list[Role], cuts: list[int]) -> None:
    """And layers read as they do without a pipeline."""
    # A model's roles read no list before one is written.
    first = next((layer for layer, role in enumerate(drawn) if role.writes_list), len(drawn))
    roles = tuple(Role.DENSE if layer < first else role for layer, role in enumerate(drawn))
    bounds = [0, *sorted(min(cut, len(roles)) for cut in cuts), len(roles)]
    for start, stop in itertools.pairwise(bounds):
        own = held_roles(roles, range(start, stop))
        written = False
        for layer, role in enumerate(own):
            if not start <= layer < stop:
                assert role is Role.DENSE
                continue
            written |= role.writes_list
            assert role.reads_list == roles[layer].reads_list
            assert written or not role.reads_list


def test_policies_with_the_old_names_load_and_say_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(policy.logger, "warning", said.append)
    policy._say_former_names.cache_clear()
    for name in ("one", "two"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"roles": ["dense", "select", "reuse"]}))
        read = policy.load(str(path)).contents
        assert read.roles == [Role.DENSE, Role.DENSE_AND_WRITE, Role.READ]
    assert len(said) == 1
    assert "select is dense_and_write now" in said[0]
    read.save(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["roles"] == ["dense", "dense_and_write", "read"]
