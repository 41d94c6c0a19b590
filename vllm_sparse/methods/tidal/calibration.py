"""TidalDecode's layers: how well each layer's list serves the layers after it, and which layers should choose.

The paper (arXiv 2410.05076, section 3) measures one re-selection layer by accuracy, model by model; a dynamic programme
over measured recall is HyLRA's idea (arXiv 2602.00777).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from vllm_sparse.keys import PlainKeys, plain_keys
from vllm_sparse.methods.decode import LayerMemory
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.roles import Role


class ReuseRecall:
    """Attention that each layer would keep with the list of each layer before it, over the last positions of prompts.

    Lists are chosen as the method chooses them, token by token. Only those of the current prompt are held, and one
    position's attention at a time: ``[query_heads, context]``.

    Args:
        layers: attention layers.
        query_heads: of a layer.
        method: whose `select` chooses; its layers' roles do not matter.
        positions: last tokens of each prompt to measure at, as if they had just been decoded.
    """

    def __init__(self, layers: int, query_heads: int, method: Tidal, positions: int) -> None:
        self.method = method
        self.positions = positions
        self._mass = torch.zeros(layers, layers, query_heads, dtype=torch.float64)
        self._measured = 0
        # Of each position of the current prompt, the lists of the layers so far.
        self._lists: list[list[torch.Tensor]] = []

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """Measure a layer; layers come in order, prompt after prompt.

        Args:
            layer: its index.
            query: ``[query_heads, tokens, head_size]``, rotary positions applied.
            key: ``[kv_heads, tokens, head_size]``, likewise.
            scale: softmax scale.

        Returns:
            Share of this prompt's attention kept: float64 ``[layer + 1, query_heads]``, with the list of each layer up
            to this one.
        """
        if layer == 0:
            self._lists = [[] for _ in range(self.positions)]
            self._measured += 1
        kv_heads, tokens, head_size = key.shape
        held = plain_keys(key)
        transposed = key.float().transpose(1, 2)
        kept = torch.zeros(layer + 1, len(query), dtype=torch.float64)
        for position, lists in enumerate(self._lists):
            context = tokens - self.positions + 1 + position
            newest = query[:, context - 1]
            keys = PlainKeys(held.kv_cache, held.block_table, context)
            lists.append(self.method.select(newest, keys, scale, 1, LayerMemory()).pages)
            grouped = newest.view(kv_heads, -1, head_size).float()
            weight = (grouped @ transposed[..., :context] * scale).softmax(2).flatten(0, 1)
            chosen = torch.stack(lists).long().repeat_interleave(len(weight) // len(lists[0]), dim=1)
            kept += weight.expand(layer + 1, -1, -1).gather(2, chosen).sum(2).double().cpu()
        kept /= self.positions
        self._mass[: layer + 1, layer] += kept
        return kept

    @property
    def mass(self) -> torch.Tensor:
        """Share of the attention kept, mean over positions and prompts: float64 ``[choosing, reading, query_heads]``.

        0 where the choosing layer comes after the reading one; on the diagonal a layer reads its own list.
        """
        return self._mass / self._measured

    @property
    def recall(self) -> list[list[float]]:
        """``[choosing][reading]``: of the attention that a head keeps with its layer's own list, the share that it
        keeps with the other layer's; of the head that loses most.

        The worst head, because the heads that look things up are few, and a mean over heads does not see them fail.
        Relative to the layer's own list, because heads that attend evenly keep little with any list of that length,
        and would be the worst ones whatever is chosen.
        """
        mass = self.mass
        own = mass.diagonal().T
        recall: list[list[float]] = (mass / own).amin(2).tolist()
        return recall


def best_selecting_layers(recall: list[list[float]], first: int, selections: int) -> tuple[int, ...]:
    """The layers that should read everything and choose a list, so that the worst recall is as high as can be; among
    those with the highest, the mean recall.

    Args:
        recall: ``[choosing][reading]``.
        first: the first selecting layer; those before it are dense.
        selections: number of selecting layers.

    Returns:
        Ascending; each layer between them reads the list chosen last.
    """
    layers = len(recall)

    def worst(selecting: int, stop: int) -> float:
        return min(recall[selecting][selecting + 1 : stop], default=math.inf)

    floor, _ = _best_split(worst, min, layers, first, selections)

    def total(selecting: int, stop: int) -> float:
        return sum(recall[selecting][selecting + 1 : stop]) if worst(selecting, stop) >= floor else -math.inf

    # The number of reading layers is given, so the largest sum is the largest mean.
    return _best_split(total, float.__add__, layers, first, selections)[1]


def _best_split(
    value: Callable[[int, int], float], join: Callable[[float, float], float], layers: int, first: int, selections: int
) -> tuple[float, tuple[int, ...]]:
    """Cut layers `first` to the last into `selections` runs, so that their joined value is the largest.

    Args:
        value: of a run from a layer up to another, that one left out.
        join: of two values; must not fall when one of them rises.
        layers: of the model.
        first: where the first run begins.
        selections: runs.

    Returns:
        The value, and where the runs begin.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        start: (float(value(start, layers)), (start,)) for start in range(first, layers)
    }
    for _ in range(selections - 1):
        best = {
            start: max(
                (
                    (join(float(value(start, following)), rest), (start, *begins))
                    for following, (rest, begins) in best.items()
                    if following > start
                ),
                key=lambda found: found[0],
            )
            for start in range(first, max(best))
        }
    return best[first]


def roles_of(selecting: tuple[int, ...], layers: int) -> list[Role]:
    """Roles of all layers; a selecting layer whose list no layer would read is only dense."""
    first = selecting[0]
    roles = [Role.DENSE if layer < first else Role.READ for layer in range(layers)]
    for layer in selecting:
        read = layer + 1 < layers and layer + 1 not in selecting
        roles[layer] = Role.DENSE_AND_WRITE if read else Role.DENSE
    return roles


def choose_roles(
    recall: list[list[float]], full_layers: int, selections: int, recall_floor: float | None = None
) -> list[Role]:
    """The policy whose worst recall, then mean recall, is highest.

    Args:
        recall: ``[choosing][reading]``.
        full_layers: first layers, dense; the next one chooses.
        selections: layers after them that read everything; 1 to the layers after them less one.
        recall_floor: instead, as few as bring the worst recall to this.

    Raises:
        ValueError: the floor is out of reach while a layer still reads a list.
    """
    layers = len(recall)
    if recall_floor is None:
        return roles_of(best_selecting_layers(recall, full_layers, selections), layers)
    best = 0.0
    for number in range(1, layers - full_layers):
        roles = roles_of(best_selecting_layers(recall, full_layers, number), layers)
        worst = worst_recall(roles, recall)
        if worst >= recall_floor:
            return roles
        best = max(best, worst)
    raise ValueError(
        f"no policy that leaves a layer sparse has a worst recall of {recall_floor}; the best has {best:.3f}"
    )


def worst_recall(roles: Sequence[Role], recall: list[list[float]]) -> float:
    """Of the layers that read a list; arguments as in `recall_of`."""
    return min(found for found in recall_of(roles, recall) if found is not None)


def recall_of(roles: Sequence[Role], recall: list[list[float]]) -> list[float | None]:
    """Recall of each layer that reads a list, None for the others.

    Args:
        roles: of each layer.
        recall: ``[choosing][reading]``.
    """
    found: list[float | None] = []
    selecting = -1
    for layer, role in enumerate(roles):
        if role is Role.DENSE_AND_WRITE:
            selecting = layer
        found.append(recall[selecting][layer] if role is Role.READ else None)
    return found
