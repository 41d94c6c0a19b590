"""Fresh random inputs: a seed drawn per test, shown with a failure, and settable with ``--seed``."""

from __future__ import annotations

import secrets
from typing import Any

import hypothesis
import pytest
import torch

from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton

torch.set_num_threads(2)
hypothesis.settings.register_profile("shared", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs, as a failure prints it")


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers; the seed is in the captured output of a failing test."""
    given: int | None = request.config.getoption("--seed")
    seed = secrets.randbits(32) if given is None else given
    print(f"random inputs: --seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs run one after the other, so grids that are to fill a GPU are kept small."""
    if CAN_RUN and DEVICE == "cpu":
        from vllm_sparse.kernels.token_scores import triton as token_scores

        monkeypatch.setattr(token_scores, "PROGRAMS", 32)


def is_served(nodeid: str) -> bool:
    """Whether a test asks a server, which it shares with the others that do."""
    return nodeid.startswith("tests/serving/")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Served tests first: with two workers the longest group of tests begins at once.

    Tests are marked by what they need, so that `make test-fast` and `make test-gpu` find them.
    """
    items.sort(key=lambda item: not is_served(item.nodeid))
    for item in items:
        reasons = {str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif")}
        uses_triton = needs_triton.kwargs["reason"] in reasons
        if is_served(item.nodeid):
            item.add_marker("served")
        if item.name == "test_under_the_interpreter" or (uses_triton and DEVICE == "cpu"):
            item.add_marker("interpreted")
        if reasons & {"no GPU", "no Hopper GPU"} or (uses_triton and DEVICE == "cuda"):
            item.add_marker("gpu")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers, one runs all served tests, so that one server runs at a time; other files stay whole."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "served" if is_served(nodeid) else nodeid.partition("::")[0]

    return ByServer(config, log)
