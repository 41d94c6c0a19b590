"""Roles have one meaning on the host, on the device and in policy files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from vllm_sparse.kernels.decode_roles import reference
from vllm_sparse.methods.tidal import policy
from vllm_sparse.step.roles import Role, reading_layers


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
