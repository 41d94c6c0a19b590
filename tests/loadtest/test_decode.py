"""The benchmark of decoding: rows read what they should, and recall, error and steps are what they are called."""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from typing import Literal

import pytest
import torch

from loadtest.benchmarks.kernels import decode
from loadtest.benchmarks.kernels.batch import DecodeBatch, write_batch
from loadtest.benchmarks.kernels.heads import Heads, synthetic_heads
from loadtest.benchmarks.kernels.timing import graph_seconds, mean_seconds
from loadtest.benchmarks.kernels.truth import kept_mass
from tests import oracle
from vllm_sparse.keys import PagedKeys
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.registry import DECODE_METHODS
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.pages import PageList, concatenate
from vllm_sparse.step.roles import Role

needs_executor = pytest.mark.skipif(
    not oracle.CPU_KERNEL and not oracle.has_hopper(), reason="needs vLLM's CPU kernel or a Hopper GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 32
EVERYTHING = 1 << 40


def heads_of(generator: torch.Generator, queries: int, context: int, query_heads: int = 4) -> Heads:
    seed = int(torch.randint(1 << 30, (1,), generator=generator))
    on_device = torch.Generator(DEVICE).manual_seed(seed)
    return synthetic_heads(on_device, queries, context, query_heads, 2, 64, 6.0, torch.bfloat16)


def probabilities(batch: DecodeBatch, row: int) -> torch.Tensor:
    """A row's attention in float64: ``[query_heads, context]``."""
    context = batch.seq_lens[row]
    everything = torch.ones(context, dtype=torch.bool)
    keys = batch.heads.keys[:, :context]
    return oracle.probabilities(batch.query[row : row + 1], keys, batch.heads.scale, everything)[:, 0]


def lists_of(method: Tidal, batch: DecodeBatch) -> list[PageList]:
    scale, page_size = batch.heads.scale, batch.page_size_tokens
    return [
        method.select(batch.query[row], batch.keys(row, batch.seq_lens[row]), scale, page_size, LayerMemory())
        for row in range(batch.rows)
    ]


def expected_mass(lists: list[PageList], batch: DecodeBatch) -> float:
    """Share of the attention in the lists' logical tokens, mean over rows and query heads."""
    shares = []
    for row, one in enumerate(lists):
        weight = probabilities(batch, row)
        kept = torch.stack([oracle.kept_positions(one, n, weight.shape[1]) for n in range(len(one.pages))])
        shares.append((weight * kept.repeat_interleave(len(weight) // len(kept), dim=0)).sum(1).mean())
    return float(torch.stack(shares).mean())


@needs_executor
@pytest.mark.parametrize("most_bytes", [0, EVERYTHING])
@pytest.mark.parametrize("lists", ["kv_head", "query_head"])
def test_recall_is_the_mass_of_the_listed_tokens(
    lists: Literal["kv_head", "query_head"], most_bytes: int, generator: torch.Generator
) -> None:
    """With a copy of the text for each row, and with one that all rows share."""
    batch = write_batch(heads_of(generator, 5, 700), 3, BLOCK, most_bytes, seed=1)
    assert batch.copies == (3 if most_bytes else 1)
    assert batch.seq_lens == [698, 699, 700]
    method = Tidal(budget_tokens=192, list_per=lists)
    launch = decode.selection_of(method, batch)()
    expected = expected_mass(lists_of(method, batch), batch)
    assert 0.1 < expected < 0.999
    assert kept_mass(batch, launch) == pytest.approx(expected, abs=1e-4)


@needs_executor
def test_a_list_of_another_rows_tokens_is_noticed(generator: torch.Generator) -> None:
    batch = write_batch(heads_of(generator, 2, 300), 2, BLOCK, EVERYTHING, seed=1)
    first, second = lists_of(Tidal(budget_tokens=128), batch)
    launch = write_batch(batch.heads, 2, BLOCK, EVERYTHING, seed=2).launch(concatenate([first, second]))
    with pytest.raises(ValueError, match="names a token of another row"):
        kept_mass(batch, launch)


@needs_executor
def test_dense_and_full_lists_equal_float64(generator: torch.Generator) -> None:
    batch = write_batch(heads_of(generator, 3, 417), 3, BLOCK, EVERYTHING, seed=3)
    dense, listed = batch.dense()(), batch.attend(decode.selection_of(Tidal(budget_tokens=1024), batch)())
    for row in range(3):
        values = oracle.expand(batch.heads.values[:, : batch.seq_lens[row]], 4)
        exact = torch.einsum("hk,hkd->hd", probabilities(batch, row), values)
        oracle.assert_close(dense[row], exact)
        oracle.assert_close(listed[row], exact)
    density, recall, error = decode.quality(Tidal(budget_tokens=1024), [batch], [Role.WRITE_AND_READ])
    assert density == pytest.approx(1)
    assert recall == pytest.approx(1, abs=1e-5)
    assert error < 0.01


@needs_executor
def test_a_layer_is_judged_by_the_list_that_it_reads(generator: torch.Generator) -> None:
    """Layer 2 reads what layer 1 chose, of other keys."""
    first, second = (write_batch(heads_of(generator, 2, 640), 2, BLOCK, EVERYTHING, seed=4) for _ in range(2))
    method = Tidal(budget_tokens=192)
    _, recall, error = decode.quality(method, [first, second], [Role.DENSE_AND_WRITE, Role.READ])
    lists = lists_of(method, first)
    assert recall == pytest.approx(expected_mass(lists, second), abs=1e-4)
    assert recall < expected_mass(lists_of(method, second), second)
    dense, listed = second.dense()().float(), second.attend(second.launch(concatenate(lists))).float()
    assert error == pytest.approx(float((dense - listed).norm() / dense.norm()), rel=1e-3)


@needs_executor
@pytest.mark.parametrize("name", list(DECODE_METHODS))
def test_measuring_gives_a_line_per_budget(name: str, generator: torch.Generator) -> None:
    batch = write_batch(heads_of(generator, 2, 1500), 2, BLOCK, EVERYTHING, seed=5)
    device = decode.Device("here", 1e10, 0.0, repeats=1, graph=False)
    few, many = decode.measure("heads", [batch], [decode.method_knobs(name)], [128, 512], 32, device)
    assert (few.method, few.budget, many.budget) == (name, 128, 512)
    assert few.roles == DECODE_METHODS[name]().layer_roles(32)
    assert min(few.recall, many.recall, few.error, many.error) > 0
    assert max(few.recall, many.recall) < 1
    # Of a longer list of hip's a shorter one need be no part, and what hip and pages lose may cancel out.
    if name != "hip":
        assert few.recall < many.recall
    if name == "tidal":
        assert many.error < few.error
    # A page is twice what hip keeps or drops at a time.
    assert 0.8 * 512 / 1500 < many.density < (1.9 if name == "hip" else 1.1) * 512 / 1500
    # Two rows, two KV heads of 64, two bytes, keys and values.
    kept = round(many.density * sum(batch.seq_lens))
    assert many.floor_seconds == pytest.approx(kept * 2 * 64 * 2 * 2 / 1e10, rel=1e-3)
    assert min(few.selection_seconds, few.attention_seconds, few.dense_seconds) > 0
    assert decode.line(few).count("|") == decode.HEADER.split("\n")[0].count("|")


@pytest.mark.parametrize("name", list(DECODE_METHODS))
@pytest.mark.parametrize("budget", [256, 1000, 2048, 4096])
def test_a_budget_is_what_a_method_reads(name: str, budget: int) -> None:
    assert 0.85 * budget <= DECODE_METHODS[name].with_budget(budget).budget_tokens <= budget


@needs_executor
def test_steps_follow_one_another(generator: torch.Generator) -> None:
    """A method that renews its search every few steps does so as in a server."""
    seen: list[int] = []

    class Watched(Tidal):
        def select(
            self, query: torch.Tensor, keys: PagedKeys, scale: float, page_size_tokens: int, memory: LayerMemory
        ) -> PageList:
            seen.append(keys.seq_len)
            return super().select(query, keys, scale, page_size_tokens, memory)

    batch = write_batch(heads_of(generator, 2, 400), 2, BLOCK, EVERYTHING, seed=6)
    choose = decode.selection_by_request(Watched(budget_tokens=128), batch, 3)
    launches = [choose() for _ in range(4)]
    assert seen == [397, 398, 398, 399, 399, 400, 397, 398]
    assert torch.equal(launches[0].pages, launches[3].pages)


def test_a_step_is_the_sum_of_its_layers() -> None:
    def step(roles: list[Role]) -> float:
        parts = (8.0, 2.0, 1.0, 10.0)
        return decode.Measurement("h", 9, 1, 1, "m", 4, 0.5, *parts, roles, 0.9, 0.1).step_seconds

    assert step([Role.DENSE, Role.DENSE_AND_WRITE, Role.READ, Role.READ]) == 10 + (8 + 10) + 2 * 2
    assert step([Role.DENSE, Role.WRITE_AND_READ, Role.WRITE_AND_READ]) == 10 + 2 * (8 + 2)


def test_the_mean_of_calls_counts_the_dear_ones() -> None:
    calls = itertools.count(1)

    def call() -> None:
        if next(calls) % 4 == 0:
            time.sleep(0.02)

    assert mean_seconds(call, 8) >= 2 * 0.02 / 8
    assert next(calls) == 10


@oracle.needs_cuda
def test_a_graph_times_the_call_alone() -> None:
    small, large = (torch.ones(1 << bits, device="cuda") for bits in (24, 27))
    times = [graph_seconds(functools.partial(tensor.mul_, 1.0), repeats=5) for tensor in (small, large)]
    assert 4 < times[1] / times[0] < 16


@pytest.mark.parametrize("budget", ["1000", "5000"])
def test_a_budget_of_everything_is_refused(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.main(["--lengths", "1001", "--batches", "1", "4", "--budgets", "64", budget])
    assert "at most 966 are allowed" in capsys.readouterr().err


def test_methods_of_the_command_line_may_have_knobs() -> None:
    made = decode.method_knobs('blocktopk={"candidate_factor": 4}')
    assert (made.name, made.knobs) == ("blocktopk", {"candidate_factor": 4})
    assert decode.method_knobs("tidal").knobs == {}
    for wrong, message in (
        ("nothing", "'nothing' is no method; there are tidal"),
        ('tidal={"candidate_factor": 4}', "knobs of tidal"),
        ("tidal={", "knobs of tidal"),
        ('blocktopk={"candidate_factor": 17}', "less than or equal to 16"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            decode.method_knobs(wrong)
