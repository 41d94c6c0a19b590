"""Sparse layers in two KV-cache groups: each layer reads and is written by the block table of its own group."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch

from tests import oracle
from tests.backend.conftest import HEAD_SIZE, HEADS, KV_HEADS, LAYERS, Engine
from tests.backend.test_forward import BLOCK, MIXED, PLATFORM, Row, Step, check, common_metadata, forward, run_stock
from vllm_sparse.config.request import SparseParams
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.metrics import WorkerMetrics

GROUPS = 2


@pytest.fixture(scope="module")
def builders(engine: Engine) -> list[Any]:
    """A metadata builder for the layers with even numbers, and one for the others."""
    spec = engine.layers[0].get_kv_cache_spec(engine.config)
    return [
        type(engine.builder)(
            spec, [layer.layer_name for layer in engine.layers[group::GROUPS]], engine.config, torch.device("cpu")
        )
        for group in range(GROUPS)
    ]


def make_step(rows: list[Row], generator: torch.Generator) -> Step:
    """A step whose groups of layers have their requests on different blocks."""
    orders = torch.randint(1 << 30, (GROUPS,), generator=generator).tolist()
    data, queries = [], []
    for layer in range(LAYERS):
        keys = [oracle.random_tensor(PLATFORM, generator, KV_HEADS, row.context, HEAD_SIZE) for row in rows]
        values = [oracle.random_tensor(PLATFORM, generator, KV_HEADS, row.context, HEAD_SIZE) for row in rows]
        order = torch.Generator().manual_seed(orders[layer % GROUPS])
        data.append(oracle.paged(PLATFORM, keys, values, BLOCK, order))
        tokens = sum(row.tokens for row in rows)
        queries.append(oracle.random_tensor(PLATFORM, generator, tokens, HEADS, HEAD_SIZE, spread=2))
    assert not torch.equal(data[0].block_table, data[1].block_table)
    return Step(rows, data, queries, common_metadata(rows, data[0].block_table))


def run(engine: Engine, builders: list[Any], step: Step) -> list[torch.Tensor]:
    """Each layer's output, with vLLM's description of the step for each group as its model runners make it."""
    from vllm_sparse.step.requests import TABLE, SparseRequest

    for index, row in enumerate(step.rows):
        TABLE.put(index, None if row.params.is_dense else SparseRequest(row.params))
    metadata = []
    for group, builder in enumerate(builders):
        common = copy(step.common)
        common.block_table_tensor = step.data[group].block_table
        metadata.append(builder.build(0, common))
    return [
        forward(layer.impl, layer, query, data.kv_cache, metadata[number % GROUPS])
        for number, (layer, query, data) in enumerate(zip(engine.layers, step.queries, step.data, strict=True))
    ]


def test_a_mixed_step_equals_the_oracle_in_every_layer(
    engine: Engine, builders: list[Any], generator: torch.Generator
) -> None:
    """A list that a layer of one group wrote is read by layers of both."""
    step = make_step(MIXED, generator)
    check(step, run(engine, builders, step))


@pytest.fixture
def finished_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that were counted in each finished step."""
    counted: list[int] = []
    finish = WorkerMetrics.finish_step

    def count(self: WorkerMetrics, densities: Any, *args: Any) -> None:
        counted.append(len(densities))
        finish(self, densities, *args)

    monkeypatch.setattr(WorkerMetrics, "finish_step", count)
    return counted


def test_a_step_is_planned_and_counted_once(
    engine: Engine, builders: list[Any], generator: torch.Generator, finished_steps: list[int]
) -> None:
    row = Row(1, 700, SparseParams(None, Tidal(budget_tokens=128, dense_layers=1, selection_reads="everything")))
    for steps in (1, 2):
        run(engine, builders, make_step([row, row], generator))
        assert finished_steps == [2] * steps


def test_a_dense_step_after_a_sparse_one_is_the_stock_step(
    engine: Engine, builders: list[Any], generator: torch.Generator
) -> None:
    run(engine, builders, make_step(MIXED, generator))
    step = make_step([Row(1, 300), Row(200, 900, prefilling=True)], generator)
    outputs = run(engine, builders, step)
    for group in range(GROUPS):
        step.common.block_table_tensor = step.data[group].block_table
        for sparse, stock in list(zip(outputs, run_stock(engine, step), strict=True))[group::GROUPS]:
            assert torch.equal(sparse, stock)
