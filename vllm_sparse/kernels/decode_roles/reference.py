"""Role of each decode row in each layer, in PyTorch: the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Numbers of `vllm_sparse.step.roles.Role` on the device.
DENSE, DENSE_AND_WRITE, READ, WRITE_AND_READ = range(4)


@dataclass(frozen=True)
class RowSettings:
    """Settings of decode rows that the host writes. They change with the batch, not from step to step.

    Attributes:
        method: int32 ``[rows]`` number of the row's method, -1 for none.
        least_context: int32 ``[rows]`` the row is dense unless its context is longer.
        scored: int32 ``[rows]`` 1 if its method scores all cached tokens, which takes room, else 0.
        roles: int8 ``[rows, layers]`` numbers of the layers' roles, as above.
    """

    method: torch.Tensor
    least_context: torch.Tensor
    scored: torch.Tensor
    roles: torch.Tensor


@dataclass(frozen=True)
class LayerContexts:
    """Context lengths by layer, in tokens, from which kernels know what to do for each decode row.

    Attributes:
        starts: int64 ``[rows]`` index of a row's first score (`vllm_sparse.step.rows.RowScores`).
        dense: int32 ``[layers, rows]`` context of the rows that read all tokens, else 0.
        members: int32 ``[methods, rows]`` context of the rows with this method, sparse or not, else 0.
        choosing: int32 ``[methods, layers, rows]`` context of the rows that select by this method, else 0.
        kept_tokens: int32 ``[layers, rows * kv_heads]`` tokens of the lists that are read; 0 until they are
            selected.
    """

    starts: torch.Tensor
    dense: torch.Tensor
    members: torch.Tensor
    choosing: torch.Tensor
    kept_tokens: torch.Tensor


def layer_contexts(
    settings: RowSettings, seq_lens: torch.Tensor, capacity_tokens: int, contexts: LayerContexts
) -> None:
    """Compute a step's contexts.

    Rows get room for their scores in order. A row for which too little is left is dense and takes none.

    Args:
        settings: settings of the rows.
        seq_lens: int32 ``[rows]``; 0 for rows that pad the batch.
        capacity_tokens: tokens for whose scores there is room.
        contexts: written; `starts` is undefined for rows that take no room.
    """
    sparse = (settings.method >= 0) & (seq_lens > settings.least_context)
    needed = torch.where(sparse & (settings.scored > 0), seq_lens, 0)
    starts = needed.cumsum(0) - needed
    # All rows after one that found no room are dense too: whether one fitted would depend on its neighbours.
    sparse &= starts + needed <= capacity_tokens
    contexts.starts.copy_(starts)
    roles = settings.roles.T
    reading = sparse & ((roles == READ) | (roles == WRITE_AND_READ))
    contexts.dense.copy_(torch.where(reading, 0, seq_lens))
    chooses = sparse & ((roles == DENSE_AND_WRITE) | (roles == WRITE_AND_READ))
    for method in range(contexts.choosing.shape[0]):
        contexts.members[method] = torch.where(settings.method == method, seq_lens, 0)
        contexts.choosing[method] = torch.where(chooses & (settings.method == method), seq_lens, 0)
    contexts.kept_tokens.zero_()


def pass_on(
    settings: RowSettings, layer: int, choosing: torch.Tensor, kept_tokens: torch.Tensor, contexts: LayerContexts
) -> None:
    """Tell the layers that read lists written in a layer how long these are.

    Args:
        settings: settings of the rows.
        layer: index of the layer that selected.
        choosing: int32 ``[rows]`` not 0 for the rows that selected in this layer.
        kept_tokens: int32 ``[rows * kv_heads]`` tokens of the lists.
        contexts: `kept_tokens` of the layers that read, up to the row's next selection, is written.
    """
    rows = choosing.shape[0]
    kv_heads = kept_tokens.shape[0] // rows
    active = choosing > 0
    for later in range(layer + 1, settings.roles.shape[1]):
        role = settings.roles[:, later]
        active = active & (role != DENSE_AND_WRITE) & (role != WRITE_AND_READ)
        # Dense layers may lie between.
        lists = (active & (role == READ)).repeat_interleave(kv_heads)
        contexts.kept_tokens[later] = torch.where(lists, kept_tokens, contexts.kept_tokens[later])


def take_sparse(dense_context: torch.Tensor, sparse: torch.Tensor, output: torch.Tensor) -> None:
    """Copy the rows that read a list into the output, which already holds the dense rows.

    Args:
        dense_context: int32 ``[rows]`` 0 for the rows to copy.
        sparse: ``[rows, query_heads, head_size]`` output of attention over the lists.
        output: ``[rows, query_heads, head_size]``, written.
    """
    output.copy_(torch.where((dense_context == 0).view(-1, 1, 1), sparse, output))
