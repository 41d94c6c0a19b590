"""Decode roles in Triton equal their PyTorch specification: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.hopper import compile_for_hopper
from tests.kernels.interpreter import CAN_RUN, DEVICE, needs_triton, run_under_the_interpreter
from vllm_sparse.kernels.decode_roles import LayerContexts, RowSettings, reference
from vllm_sparse.step.roles import Role

pytest.importorskip("triton")

MOST_ROWS = 2050


@pytest.mark.skipif(CAN_RUN, reason="runs right here")
def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__, passing=10)


def random_settings(rows: int, layers: int, methods: int, generator: torch.Generator) -> RowSettings:
    """Settings of the first rows of a larger table, as the server keeps them."""
    table = torch.randint(-1, methods, (MOST_ROWS, 3), generator=generator).int()
    table[:, 1] = torch.randint(0, 3000, (MOST_ROWS,), generator=generator)
    table[:, 2] = torch.randint(0, 2, (MOST_ROWS,), generator=generator)
    roles = torch.randint(0, 4, (MOST_ROWS, layers), generator=generator).to(torch.int8)
    table, roles = table.to(DEVICE)[:rows], roles.to(DEVICE)[:rows]
    return RowSettings(table[:, 0], table[:, 1], table[:, 2], roles)


def poisoned_contexts(rows: int, layers: int, methods: int, kv_heads: int) -> LayerContexts:
    def poisoned(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, -9, dtype=dtype, device=DEVICE)

    return LayerContexts(
        poisoned(MOST_ROWS, dtype=torch.int64)[:rows],
        poisoned(layers, MOST_ROWS)[:, :rows],
        poisoned(methods, MOST_ROWS)[:, :rows],
        poisoned(methods, layers, MOST_ROWS)[..., :rows],
        poisoned(layers, MOST_ROWS * kv_heads)[:, : rows * kv_heads],
    )


@needs_triton
@pytest.mark.parametrize(
    ("rows", "layers", "methods", "kv_heads"),
    [(1, 1, 1, 1), (7, 32, 3, 8), (40, 5, 2, 1), (16, 33, 1, 3), (2050, 2, 2, 1)],
)
def test_contexts_equal_the_reference(rows: int, layers: int, methods: int, kv_heads: int) -> None:
    from vllm_sparse.kernels.decode_roles import triton as decode_roles

    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    settings = random_settings(rows, layers, methods, generator)
    context = torch.randint(0, 5000, (rows,), generator=generator).int()
    context[rows // 2 + 1 :: 5] = 0
    context = context.to(DEVICE)
    # Room for some rows, for none, for all.
    for capacity in (rows * 1500, 0, 1 << 40):
        expected, actual = (poisoned_contexts(rows, layers, methods, kv_heads) for _ in range(2))
        reference.layer_contexts(settings, context, capacity, expected)
        decode_roles.layer_contexts(settings, context, capacity, actual)
        for name in ("starts", "dense", "members", "choosing", "kept_tokens"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), f"{name}, seed {seed}"
        chosen = actual.choosing[0, 0]
        kept = torch.randint(1, 100, (rows * kv_heads,), generator=generator).int().to(DEVICE)
        for layer in {0, layers // 2, layers - 1}:
            reference.pass_on(settings, layer, chosen, kept, expected)
            decode_roles.pass_on(settings, layer, chosen, kept, actual)
            assert torch.equal(actual.kept_tokens, expected.kept_tokens), f"layer {layer}, seed {seed}"


@needs_triton
def test_a_row_is_dense_or_reads_a_list() -> None:
    """In no layer both, in none neither; rows without room for their scores are dense everywhere."""
    from vllm_sparse.kernels.decode_roles import triton as decode_roles

    seed = random.randrange(1 << 30)
    settings = random_settings(20, 6, 2, torch.Generator().manual_seed(seed))
    context = torch.full((20,), 4000, dtype=torch.int32, device=DEVICE)
    settings.scored.fill_(1)
    settings.method.fill_(1)
    contexts = poisoned_contexts(20, 6, 2, 1)
    decode_roles.layer_contexts(settings, context, 8 * 4000 + 1, contexts)
    for row in range(20):
        for layer in range(6):
            role = list(Role)[int(settings.roles[row, layer])] if row < 8 else Role.DENSE
            assert int(contexts.dense[layer, row]) == (0 if role.reads_list else 4000), f"seed {seed}"
            assert int(contexts.choosing[1, layer, row]) == (4000 if role.writes_list else 0), f"seed {seed}"
    assert not bool(contexts.choosing[0].any())
    assert contexts.starts[:8].tolist() == [4000 * row for row in range(8)]


@needs_triton
@pytest.mark.parametrize(("rows", "heads", "head_size"), [(1, 1, 8), (5, 7, 80), (3, 32, 128), (9, 2, 64)])
def test_sparse_rows_are_put_into_the_output(rows: int, heads: int, head_size: int) -> None:
    from vllm_sparse.kernels.decode_roles import triton as decode_roles

    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    dense = torch.randint(0, 2, (rows,), generator=generator).int().to(DEVICE)
    sparse, output = (torch.randn(rows, heads, head_size, generator=generator).to(DEVICE) for _ in range(2))
    sparse[dense > 0] = float("nan")
    output[dense == 0] = float("nan")
    expected = output.clone()
    reference.take_sparse(dense, sparse, expected)
    decode_roles.take_sparse(dense, sparse, output)
    assert torch.equal(output, expected)
    assert not bool(output.isnan().any())


@pytest.mark.skipif(CAN_RUN and DEVICE == "cpu", reason="Triton only interprets in this process")
def test_kernels_compile_for_hopper() -> None:
    from vllm_sparse.kernels.decode_roles import triton as decode_roles

    integers = ("method", "least_context", "scored", "context", "dense", "member", "choosing", "kept", "layer_kept")
    types = {
        **dict.fromkeys((f"{name}_pointer" for name in integers), "*i32"),
        **dict.fromkeys(("capacity", "rows", "layer", "layers", "width"), "i32"),
        **dict.fromkeys(("setting_stride", "role_row_stride", "dense_stride", "choosing_method_stride"), "i32"),
        **dict.fromkeys(("kept_stride", "sparse_row_stride", "output_row_stride"), "i32"),
        **dict.fromkeys(("sparse_pointer", "output_pointer"), "*bf16"),
        "role_pointer": "*i8",
        "start_pointer": "*i64",
    }
    constants = {"KV_HEADS": 8, "METHODS": 3, "ROW_TILE": 256}
    compile_for_hopper(decode_roles.layer_contexts_kernel, types, constants)
    compile_for_hopper(decode_roles.pass_on_kernel, types, {"KV_HEADS": 8, "LAYER_TILE": 32}, num_warps=1)
    compile_for_hopper(decode_roles.take_sparse_kernel, types, {"TILE": decode_roles.OUTPUT_TILE})
