"""Layers that cap their attention logits or have sinks: what they read is the oracle's, and what they may run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import oracle
from tests.backend.conftest import HEAD_SIZE, HEADS, KV_HEADS, LAYERS, SCALE, Engine
from tests.backend.test_forward import BLOCK, Row, Step, forward, make_step
from tests.methods.lists import chunk_allowed
from tests.oracle import Platform, needs_cpu_kernel
from tests.prometheus import counted
from vllm_sparse.config.request import SparseParams
from vllm_sparse.kernels.page_list import to_physical
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.prefill import Layer
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.pages import PageList
from vllm_sparse.step.launch import Launch

# Of few units, so that random logits are bent by it.
CAP = 2.0
FEATURES = [(CAP, False), (0.0, True), (CAP, True)]
FEATURE_IDS = ["soft-cap", "sinks", "both"]


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor,
    cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention in float64, with a soft cap and sinks; arguments otherwise as of `oracle.attention`."""
    heads = query.shape[1]
    logits = torch.einsum("qhd,hkd->hqk", query.double(), oracle.expand(keys, heads)) * SCALE
    if cap:
        logits = cap * (logits / cap).tanh()
    logits = logits.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(-1, 1, 1).expand(-1, logits.shape[1], 1)], dim=2)
    weights = logits.softmax(-1)[..., : keys.shape[1]]
    return torch.einsum("hqk,hkd->qhd", weights, oracle.expand(values, heads))


@needs_cpu_kernel
@pytest.mark.parametrize(("cap", "has_sinks"), [(0.0, False), *FEATURES], ids=["plain", *FEATURE_IDS])
@pytest.mark.parametrize("head_size", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_the_executor_equals_the_oracle(
    group: int, dtype: torch.dtype, head_size: int, cap: float, has_sinks: bool, generator: torch.Generator
) -> None:
    """Decode rows over random pages, a list for each KV head."""
    from vllm_sparse.backend.executors.cpu import CpuExecutor

    platform = Platform("cpu", "cpu", dtype, "vec" if head_size % 32 == 0 else "vec16")
    context, heads = 217, KV_HEADS * group
    data = oracle.random_paged(platform, generator, [context], KV_HEADS, head_size, BLOCK)
    query = oracle.random_tensor(platform, generator, 1, heads, head_size)
    sinks = torch.randn(heads, generator=generator) if has_sinks else None
    pages = torch.tensor([[0, 3, 4, 6], [1, 2, 5, 6]], dtype=torch.int32)
    last = context - 6 * BLOCK
    lists = PageList(pages, torch.full((KV_HEADS,), 3 * BLOCK + last, dtype=torch.int32), BLOCK)
    list_head = torch.arange(KV_HEADS)
    physical = to_physical(lists, data.block_table[0].expand(KV_HEADS, -1), list_head, BLOCK, KV_HEADS)
    starts = torch.arange(KV_HEADS + 1, dtype=torch.int32)
    launch = Launch(starts, 1, physical, lists.kept_tokens, BLOCK, list_head)
    output = torch.full((KV_HEADS, group, head_size), oracle.NAN, dtype=dtype)
    CpuExecutor(str(platform.isa), "auto", cap, sinks).run(
        launch, query.view(KV_HEADS, group, head_size), output, data.kv_cache, SCALE
    )
    kept = torch.stack([oracle.kept_positions(lists, row, context) for row in range(KV_HEADS)])
    allowed = kept.repeat_interleave(group, dim=0).unsqueeze(1)
    expected = reference(query, data.keys[0], data.values[0], allowed, cap, sinks)
    oracle.assert_close(output.view(1, heads, head_size), expected)


DHSA = Dhsa(density=0.3, candidate_factor=1.0)
TIDAL = Tidal(
    budget_tokens=128, dense_layers=0, reselect_layers=(), list_per="query_head", selection_reads="everything"
)
ROWS = [
    Row(1, 700, SparseParams(None, TIDAL)),
    Row(1, 300),
    Row(300, 900, SparseParams(DHSA, TIDAL), prefilling=True),
    Row(50, 200, prefilling=True),
]


@pytest.fixture
def layers(engine: Engine, request: pytest.FixtureRequest, generator: torch.Generator) -> tuple[list[Any], float, Any]:
    """Implementations of the layers with a cap, sinks or both."""
    from vllm.config import set_current_vllm_config

    from vllm_sparse.backend.cpu import SparseCpuImpl

    cap, has_sinks = request.param
    sinks = torch.randn(HEADS, generator=generator) if has_sinks else None
    impls = []
    for number in range(LAYERS):
        with set_current_vllm_config(engine.config):
            impl = SparseCpuImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, None, "auto", cap or None, sinks=sinks)
        impl.layer_number = number
        impls.append(impl)
    return impls, cap, sinks


def run(engine: Engine, impls: list[Any], step: Step, soft_cap: bool) -> list[torch.Tensor]:
    """Each layer's output, of these implementations."""
    from vllm_sparse.step.requests import TABLE, SparseRequest

    for index, row in enumerate(step.rows):
        TABLE.put(index, None if row.params.is_dense else SparseRequest(row.params))
    engine.builder._sparse_soft_cap = soft_cap
    try:
        metadata = engine.builder.build(0, step.common)
    finally:
        engine.builder._sparse_soft_cap = False
    return [
        forward(impl, layer, query, data.kv_cache, metadata)
        for impl, layer, query, data in zip(impls, engine.layers, step.queries, step.data, strict=True)
    ]


@pytest.mark.parametrize("layers", FEATURES, ids=FEATURE_IDS, indirect=True)
def test_a_mixed_step_equals_the_oracle(
    engine: Engine, layers: tuple[list[Any], float, Any], generator: torch.Generator
) -> None:
    impls, cap, sinks = layers
    step = make_step(ROWS, generator)
    outputs = run(engine, impls, step, soft_cap=bool(cap))
    written = step.queries[0][step.span(0)][0]
    tidal = TIDAL.select(written, step.data[0].reader(0), SCALE, BLOCK, LayerMemory())
    kept = torch.stack([oracle.kept_positions(tidal, head, 700) for head in range(HEADS)]).unsqueeze(1)
    for layer in (0, 1, LAYERS - 1):
        data = step.data[layer]
        chunk = step.queries[layer][step.span(2)]
        lists = DHSA.select(chunk, data.reader(2), SCALE, BLOCK, Layer(layer, 0))
        of_rows = {
            0: kept if layer else oracle.causal_mask(1, 700),
            1: oracle.causal_mask(1, 300),
            2: chunk_allowed(DHSA, lists, data, 2, chunk),
            3: oracle.causal_mask(50, 200),
        }
        assert not bool(of_rows[2].all())
        for index, allowed in of_rows.items():
            span = step.span(index)
            expected = reference(step.queries[layer][span], data.keys[index], data.values[index], allowed, cap, sinks)
            oracle.assert_close(outputs[layer][span], expected, f"layer {layer}, row {index}")


def dense_rows(phase: str, method: str) -> float:
    """Rows that ran dense because of a soft cap."""
    labels = {"phase": phase, "method": method, "reason": "soft_cap"}
    return counted("vllm_sparse_fallbacks_total", **labels)


def test_methods_that_weigh_masses_run_dense_under_a_soft_cap_and_are_counted(
    engine: Engine, generator: torch.Generator
) -> None:
    rows = [
        Row(1, 700, SparseParams(None, Tidal(budget_tokens=128, dense_layers=1))),
        Row(300, 900, SparseParams(FlexPrefill(gamma=0.4, min_budget_tokens=0)), prefilling=True),
    ]
    step = make_step(rows, generator)
    asked = [("decode", "tidal"), ("prefill", "flexprefill")]
    before = [dense_rows(*phase_and_method) for phase_and_method in asked]
    outputs = run(engine, [layer.impl for layer in engine.layers], step, soft_cap=True)
    assert [dense_rows(*phase_and_method) for phase_and_method in asked] == [count + 1 for count in before]
    for layer, output in enumerate(outputs):
        for index, row in enumerate(rows):
            span, data = step.span(index), step.data[layer]
            mask = oracle.causal_mask(row.tokens, row.context)
            expected = reference(step.queries[layer][span], data.keys[index], data.values[index], mask, 0.0, None)
            oracle.assert_close(output[span], expected)


def test_which_methods_weigh_masses() -> None:
    """Those by whose own words probabilities or shares decide; the others go by the order of scores or by position."""
    weighing = {
        f"{phase} {name}"
        for phase, methods in (("prefill", PREFILL_METHODS), ("decode", DECODE_METHODS))
        for name, method in methods.items()
        if method().weighs_masses
    }
    assert weighing == {
        "prefill flexprefill", "prefill sale", "prefill dhsa", "prefill oracle",
        "decode tidal", "decode hip", "decode blocktopk", "decode tokentopk", "decode oracle",
    }  # fmt: skip
    assert not Tidal(list_per="query_head").weighs_masses
    assert not Dhsa(candidate_factor=1.0).weighs_masses
