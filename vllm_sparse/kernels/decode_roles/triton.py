"""Role of each decode row in each layer, in Triton: one program per layer, for all rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.kernels.decode_roles import reference
from vllm_sparse.kernels.decode_roles.reference import LayerContexts, RowSettings

DENSE_AND_WRITE = tl.constexpr(reference.DENSE_AND_WRITE)
READ = tl.constexpr(reference.READ)
WRITE_AND_READ = tl.constexpr(reference.WRITE_AND_READ)
OUTPUT_TILE = 2048


# Batches grow and shrink; specialising on their size would compile in the middle of serving.
@triton.jit(do_not_specialize=["capacity", "rows"], do_not_specialize_on_alignment=["context_pointer"])
def layer_contexts_kernel(
    method_pointer,
    least_context_pointer,
    scored_pointer,
    role_pointer,
    context_pointer,
    start_pointer,
    dense_pointer,
    member_pointer,
    choosing_pointer,
    kept_pointer,
    capacity,
    rows,
    layers,
    setting_stride,
    role_row_stride,
    dense_stride,
    choosing_method_stride,
    kept_stride,
    KV_HEADS: tl.constexpr,
    METHODS: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    i_layer = tl.program_id(0)
    o_row = tl.arange(0, ROW_TILE)
    live = o_row < rows
    b_method = tl.load(method_pointer + o_row * setting_stride, mask=live, other=-1)
    b_least = tl.load(least_context_pointer + o_row * setting_stride, mask=live, other=0)
    b_scored = tl.load(scored_pointer + o_row * setting_stride, mask=live, other=0)
    b_context = tl.load(context_pointer + o_row, mask=live, other=0)
    b_role = tl.load(role_pointer + o_row * role_row_stride + i_layer, mask=live, other=0)
    b_sparse = (b_method >= 0) & (b_context > b_least)
    b_needed = tl.where(b_sparse & (b_scored > 0), b_context, 0).to(tl.int64)
    b_end = tl.cumsum(b_needed, axis=0)
    b_sparse = b_sparse & (b_end <= capacity)
    if i_layer == 0:
        tl.store(start_pointer + o_row, b_end - b_needed, mask=live)
    b_reads = b_sparse & ((b_role == READ) | (b_role == WRITE_AND_READ))
    tl.store(dense_pointer + i_layer * dense_stride + o_row, tl.where(b_reads, 0, b_context), mask=live)
    b_chooses = b_sparse & ((b_role == DENSE_AND_WRITE) | (b_role == WRITE_AND_READ))
    for method in tl.static_range(METHODS):
        if i_layer == 0:
            p_member = member_pointer + method * dense_stride + o_row
            tl.store(p_member, tl.where(b_method == method, b_context, 0), mask=live)
        p_choosing = choosing_pointer + method * choosing_method_stride + i_layer * dense_stride
        tl.store(p_choosing + o_row, tl.where(b_chooses & (b_method == method), b_context, 0), mask=live)
    for head in tl.static_range(KV_HEADS):
        p_kept = kept_pointer + i_layer * kept_stride + o_row * KV_HEADS + head
        tl.store(p_kept, tl.zeros([ROW_TILE], tl.int32), mask=live)


def layer_contexts(
    settings: RowSettings, seq_lens: torch.Tensor, capacity_tokens: int, contexts: LayerContexts
) -> None:
    """Equal to `reference.layer_contexts`; arguments as there, 1 row or more."""
    rows, layers = settings.roles.shape
    assert contexts.members.stride(0) == contexts.dense.stride(0) == contexts.choosing.stride(1)
    assert settings.method.stride() == settings.least_context.stride() == settings.scored.stride()
    layer_contexts_kernel[(layers,)](
        settings.method,
        settings.least_context,
        settings.scored,
        settings.roles,
        seq_lens,
        contexts.starts,
        contexts.dense,
        contexts.members,
        contexts.choosing,
        contexts.kept_tokens,
        capacity_tokens,
        rows,
        layers,
        settings.method.stride(0),
        settings.roles.stride(0),
        contexts.dense.stride(0),
        contexts.choosing.stride(0),
        contexts.kept_tokens.stride(0),
        KV_HEADS=contexts.kept_tokens.shape[1] // rows,
        METHODS=contexts.choosing.shape[0],
        ROW_TILE=triton.next_power_of_2(rows),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["layer"])
def pass_on_kernel(
    role_pointer,
    choosing_pointer,
    kept_pointer,
    layer_kept_pointer,
    layer,
    layers,
    role_row_stride,
    kept_stride,
    KV_HEADS: tl.constexpr,
    LAYER_TILE: tl.constexpr,
):
    i_row = tl.program_id(0)
    if tl.load(choosing_pointer + i_row) == 0:
        return
    o_layer = tl.arange(0, LAYER_TILE)
    later = (o_layer > layer) & (o_layer < layers)
    b_role = tl.load(role_pointer + i_row * role_row_stride + o_layer, mask=later, other=0)
    b_writes = (b_role == DENSE_AND_WRITE) | (b_role == WRITE_AND_READ)
    b_ends = tl.cumsum((later & b_writes).to(tl.int32), axis=0)
    # Dense layers may lie between.
    reads = later & (b_role == READ)
    for head in tl.static_range(KV_HEADS):
        kept = tl.load(kept_pointer + i_row * KV_HEADS + head)
        p_kept = layer_kept_pointer + o_layer * kept_stride + i_row * KV_HEADS + head
        tl.store(p_kept, tl.full([LAYER_TILE], 0, tl.int32) + kept, mask=reads & (b_ends == 0))


def pass_on(
    settings: RowSettings, layer: int, choosing: torch.Tensor, kept_tokens: torch.Tensor, contexts: LayerContexts
) -> None:
    """Equal to `reference.pass_on`; arguments as there."""
    rows, layers = settings.roles.shape
    pass_on_kernel[(rows,)](
        settings.roles,
        choosing,
        kept_tokens,
        contexts.kept_tokens,
        layer,
        layers,
        settings.roles.stride(0),
        contexts.kept_tokens.stride(0),
        KV_HEADS=kept_tokens.shape[0] // rows,
        LAYER_TILE=triton.next_power_of_2(layers),
        num_warps=1,
    )


@triton.jit
def take_sparse_kernel(
    dense_pointer, sparse_pointer, output_pointer, width, sparse_row_stride, output_row_stride, TILE: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    if tl.load(dense_pointer + i_row) != 0:
        return
    o_value = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = o_value < width
    b_value = tl.load(sparse_pointer + i_row * sparse_row_stride + o_value, mask=live)
    tl.store(output_pointer + i_row * output_row_stride + o_value, b_value, mask=live)


def take_sparse(dense_context: torch.Tensor, sparse: torch.Tensor, output: torch.Tensor) -> None:
    """Equal to `reference.take_sparse`; arguments as there, each row's values adjacent in memory."""
    rows, heads, head_size = output.shape
    width = heads * head_size
    assert sparse.stride()[1:] == output.stride()[1:] == (head_size, 1)
    take_sparse_kernel[(rows, triton.cdiv(width, OUTPUT_TILE))](
        dense_context, sparse, output, width, sparse.stride(0), output.stride(0), TILE=OUTPUT_TILE, num_warps=4
    )
