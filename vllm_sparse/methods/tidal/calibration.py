"""TidalDecode's layers: how well each layer's list serves the layers after it, and which layers should choose.

The paper (arXiv 2410.05076, section 3) measures one re-selection layer by accuracy, model by model; a dynamic programme
over measured recall is HyLRA's idea (arXiv 2602.00777).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.step.roles import Role


def lists_of_steps(method: Tidal, scores: torch.Tensor) -> torch.Tensor:
    """The lists that the method chooses for steps which follow one another, as `Tidal.select` does for each.

    Args:
        method: whose knobs count.
        scores: float32 ``[kv_heads, group, steps, tokens]``, scaled, minus infinity beyond a step's own token, which is
            one of the last `steps`.

    Returns:
        bool ``[kv_heads, lists of a KV head, steps, tokens]``, tokens of each list.
    """
    steps, tokens = scores.shape[2:]
    positions = torch.arange(tokens, device=scores.device)
    newest = positions[-steps:].unsqueeze(1)
    forced = (positions < method.sink_tokens) | (positions > newest - max(method.recent_tokens, 1))
    ranking = scores.log_softmax(3)
    if method.list_per == "kv_head":
        ranking = ranking.amax(1, keepdim=True)
    # Beyond a step's own token stand the tokens of later steps, which fill no place of the list.
    ranking = ranking.masked_fill(forced, torch.inf).masked_fill(positions > newest, -torch.inf)
    best = ranking.topk(min(method.budget_tokens, tokens), 3).indices
    return torch.zeros_like(ranking, dtype=torch.bool).scatter_(3, best, True) & (positions <= newest)


class ReuseRecall:
    """Attention that each layer would keep with the list of each layer before it, while a model decodes densely.

    As of `vllm_sparse.calibration.decoding.Lists`. Lists are chosen as the method chooses them, token by token; those
    of the current prompt are held.

    Args:
        layers: attention layers.
        query_heads: of a layer.
        method: which chooses; its layers' roles do not matter.
    """

    def __init__(self, layers: int, query_heads: int, method: Tidal) -> None:
        self.method = method
        self._mass = torch.zeros(layers, layers, query_heads, dtype=torch.float64)
        self._measured = 0
        self._lists: list[torch.Tensor] = []

    def listed(self, layer: int, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor, scale: float) -> None:
        """Measure a layer, which reads everything; layers come in order, prompt after prompt."""
        if layer == 0:
            self._lists = []
            self._measured += 1
        self._lists.append(lists_of_steps(self.method, scores))
        weights = scores.softmax(3)
        kept = [(weights * lists).sum(3).mean(2).flatten() for lists in self._lists]
        self._mass[: layer + 1, layer] += torch.stack(kept).double().cpu()

    @property
    def mass(self) -> torch.Tensor:
        """Share of the attention kept, mean over steps and prompts: float64 ``[choosing, reading, query_heads]``.

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


def choose_roles(recall: list[list[float]], dense_layers: int, selections: int) -> list[Role]:
    """The policy whose worst recall, then mean recall, is highest.

    Args:
        recall: ``[choosing][reading]``.
        dense_layers: first layers, dense; the next one chooses.
        selections: layers after them that read everything; 1 to the layers after them less one.
    """
    return roles_of(best_selecting_layers(recall, dense_layers, selections), len(recall))


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
