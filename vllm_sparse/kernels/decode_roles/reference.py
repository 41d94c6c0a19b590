"""What each decode row does in each layer, in PyTorch: the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Numbers of `vllm_sparse.step.roles.Role` on the device.
DENSE, DENSE_AND_WRITE, READ, WRITE_AND_READ = range(4)


@dataclass(frozen=True)
class RowSettings:
    """What the host says of decode rows; it changes when the batch does, not from step to step.

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
    """What kernels read of decode rows, by layer.

    Attributes:
        starts: int64 ``[rows]`` where a row's scores begin (`vllm_sparse.step.rows.RowScores`).
        dense: int32 ``[layers, rows]`` context of the rows that read everything, else 0.
        members: int32 ``[methods, rows]`` context of the rows that have a method, sparse or not, else 0.
        choosing: int32 ``[methods, layers, rows]`` context of the rows that choose by a method, else 0.
        kept_tokens: int32 ``[layers, rows * kv_heads]`` of the lists that are read; 0 until they are chosen.
    """

    starts: torch.Tensor
    dense: torch.Tensor
    members: torch.Tensor
    choosing: torch.Tensor
    kept_tokens: torch.Tensor


def layer_contexts(
    settings: RowSettings, context_tokens: torch.Tensor, capacity_tokens: int, contexts: LayerContexts
) -> None:
    """Work out a step's contexts.

    Rows get room for their scores in order; one that finds none left is dense, and takes none.

    Args:
        settings: of the rows.
        context_tokens: int32 ``[rows]``; 0 for rows that pad the batch.
        capacity_tokens: tokens that there is room to score.
        contexts: written; `starts` of rows that take no room are anything.
    """
    sparse = (settings.method >= 0) & (context_tokens > settings.least_context)
    needed = torch.where(sparse & (settings.scored > 0), context_tokens, 0)
    starts = needed.cumsum(0) - needed
    # Rows behind one that found no room would fit only by chance; they are dense too.
    sparse &= starts + needed <= capacity_tokens
    contexts.starts.copy_(starts)
    roles = settings.roles.T
    reading = sparse & ((roles == READ) | (roles == WRITE_AND_READ))
    contexts.dense.copy_(torch.where(reading, 0, context_tokens))
    chooses = sparse & ((roles == DENSE_AND_WRITE) | (roles == WRITE_AND_READ))
    for method in range(contexts.choosing.shape[0]):
        contexts.members[method] = torch.where(settings.method == method, context_tokens, 0)
        contexts.choosing[method] = torch.where(chooses & (settings.method == method), context_tokens, 0)
    contexts.kept_tokens.zero_()


def pass_on(
    settings: RowSettings, layer: int, choosing: torch.Tensor, kept_tokens: torch.Tensor, contexts: LayerContexts
) -> None:
    """Tell the layers that read lists written in a layer how long these are.

    Args:
        settings: of the rows.
        layer: that chose.
        choosing: int32 ``[rows]`` not 0 for the rows that did.
        kept_tokens: int32 ``[rows * kv_heads]`` of the lists.
        contexts: `kept_tokens` of the layers up to the row's next choice are written.
    """
    rows = choosing.shape[0]
    kv_heads = kept_tokens.shape[0] // rows
    active = choosing > 0
    for later in range(layer + 1, settings.roles.shape[1]):
        active = active & (settings.roles[:, later] == READ)
        lists = active.repeat_interleave(kv_heads)
        contexts.kept_tokens[later] = torch.where(lists, kept_tokens, contexts.kept_tokens[later])


def take_sparse(dense_context: torch.Tensor, sparse: torch.Tensor, output: torch.Tensor) -> None:
    """Put the rows that read a list into the output, which holds the dense rows.

    Args:
        dense_context: int32 ``[rows]`` 0 for the rows to put.
        sparse: ``[rows, query_heads, head_size]``.
        output: likewise, written.
    """
    output.copy_(torch.where((dense_context == 0).view(-1, 1, 1), sparse, output))
