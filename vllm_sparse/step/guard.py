"""The guard of one request (`sparse_min_recall`): layers that read everything because their lists kept too little.

The plan asks which layers are still sparse; `vllm_sparse.backend.guard` measures and writes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from vllm_sparse.step.roles import Role


@dataclass(eq=False)
class RequestGuard:
    """What the guard knows of a request while the model runner holds it; a preempted request starts anew.

    Attributes:
        min_recall: share of the attention mass, 0 to 1, below which a layer goes dense.
        dense_layers: layers that went dense, for the rest of the request and in both phases.
        last_check: number of the step in which decoding was checked last; -1 before the first.
        layers_checked: layers checked in decode steps, those that came again included.
    """

    min_recall: float
    dense_layers: frozenset[int] = frozenset()
    last_check: int = -1
    layers_checked: int = 0
    _last_layer: int = -1

    def observe(self, layer: int, recall: float) -> bool:
        """Take the recall of a row in a layer.

        Args:
            layer: index of the attention layer.
            recall: kept share of the attention mass, 0 to 1.

        Returns:
            Whether the layer goes dense now.
        """
        # Written so that NaN, the recall of a broken selector's empty list, counts as low.
        if recall >= self.min_recall or layer in self.dense_layers:
            return False
        self.dense_layers |= {layer}
        return True

    def sparse_layers(self, layers: Sequence[int]) -> Sequence[int]:
        """Those of a method's sparse layers that did not go dense."""
        return [layer for layer in layers if layer not in self.dense_layers] if self.dense_layers else layers

    def roles(self, roles: tuple[Role, ...]) -> tuple[Role, ...]:
        """A decode method's layer roles as they are now for this request."""
        return guarded_roles(roles, self.dense_layers) if self.dense_layers else roles

    def take_turn(self, reading: Sequence[int], layers: int, step: int) -> tuple[int, ...]:
        """Layers to check in a decode step: the next in turn.

        Args:
            reading: layers in which the row reads a list, ascending.
            layers: how many to check.
            step: number of the step.
        """
        start = bisect_right(reading, self._last_layer)
        turn = tuple([*reading[start:], *reading[:start]][:layers])
        self._last_layer, self.last_check = turn[-1], step
        self.layers_checked += len(turn)
        return turn


@lru_cache(maxsize=4096)
def guarded_roles(roles: tuple[Role, ...], dense_layers: frozenset[int]) -> tuple[Role, ...]:
    """Layer roles of a decode row some of whose layers went dense.

    Such a layer reads everything. It still writes its list if another layer reads it.

    Args:
        roles: of the method.
        dense_layers: that went dense.
    """
    guarded = list(roles)
    is_read_later = False
    for layer in reversed(range(len(roles))):
        role = roles[layer]
        if role.reads_list and layer in dense_layers:
            guarded[layer] = Role.DENSE
        if role.writes_list:
            if guarded[layer] is not Role.WRITE_AND_READ:
                guarded[layer] = Role.DENSE_AND_WRITE if is_read_later else Role.DENSE
            is_read_later = False
        elif guarded[layer] is Role.READ:
            is_read_later = True
    return tuple(guarded)
