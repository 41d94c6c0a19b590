"""Queries row by row in Triton: one program some tokens of a row, all heads that share its list."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse.step.chunks import LaunchRows

# Numbers, and tokens, that a program copies at most.
TILE_NUMBERS, MOST_TOKENS = 8192, 64


@triton.jit
def copy_rows_kernel(
    step_pointer,
    row_pointer,
    first_token_pointer,
    list_head_pointer,
    start_pointer,
    step_token_stride,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    TO_ROWS: tl.constexpr,
):
    i_row = tl.program_id(0)
    start = tl.load(start_pointer + i_row)
    tokens = tl.load(start_pointer + i_row + 1) - start
    o_token = tl.program_id(1) * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    o_number = tl.arange(0, WIDTH_TILE)
    mask = (o_token < tokens)[:, None] & (o_number < WIDTH)[None, :]
    step_token = (tl.load(first_token_pointer + i_row) + o_token).to(tl.int64)
    p_step = step_pointer + step_token[:, None] * step_token_stride
    p_step += tl.load(list_head_pointer + i_row) * WIDTH + o_number[None, :]
    p_row = row_pointer + (start + o_token).to(tl.int64)[:, None] * WIDTH + o_number[None, :]
    if TO_ROWS:
        tl.store(p_row, tl.load(p_step, mask=mask), mask=mask)
    else:
        tl.store(p_step, tl.load(p_row, mask=mask), mask=mask)


def _copy(step: torch.Tensor, by_row: torch.Tensor, rows: LaunchRows, to_rows: bool) -> None:
    """Copy from one order to the other; `step` has its heads side by side."""
    width = by_row.shape[1] * by_row.shape[2]
    width_tile = triton.next_power_of_2(width)
    token_tile = max(min(TILE_NUMBERS // width_tile, MOST_TOKENS), 1)
    copy_rows_kernel[(rows.lists.shape[0], triton.cdiv(rows.max_query_tokens, token_tile))](
        step,
        by_row,
        rows.first_token,
        rows.list_head,
        rows.starts,
        step.stride(0),
        WIDTH=width,
        WIDTH_TILE=width_tile,
        TOKEN_TILE=token_tile,
        TO_ROWS=to_rows,
        num_warps=8,
    )


def gather_rows(query: torch.Tensor, rows: LaunchRows) -> torch.Tensor:
    """Equal to `reference.gather_rows`; arguments as there."""
    heads, head_size = query.shape[1:]
    if query.stride(2) != 1 or query.stride(1) != head_size:
        query = query.contiguous()
    by_row = torch.empty(rows.tokens, heads // rows.list_heads, head_size, dtype=query.dtype, device=query.device)
    _copy(query, by_row, rows, to_rows=True)
    return by_row


def scatter_rows(attended: torch.Tensor, rows: LaunchRows, output: torch.Tensor) -> None:
    """Equal to `reference.scatter_rows`; arguments as there, the output's heads side by side."""
    assert output.stride(2) == 1
    assert output.stride(1) == output.shape[2]
    _copy(output, attended, rows, to_rows=False)
