"""Scales of an FP8 cache, as the stock kernels take them."""

from __future__ import annotations

from typing import Any

import torch

NO_SCALES: dict[str, Any] = {"q_descale": None, "k_descale": None, "v_descale": None}


class ValueScale:
    """What a layer's stored values are multiplied by, for a launch in whose softmax scale those of the others are.

    Args:
        scale: float32 ``[]``, of all heads.
    """

    def __init__(self, scale: torch.Tensor) -> None:
        self._scale = scale
        self._one = torch.ones_like(scale)

    def of_rows(self, rows: int) -> dict[str, torch.Tensor]:
        """For so many rows, each with one KV head; nothing is copied."""
        return {
            "q_descale": self._one.expand(rows, 1),
            "k_descale": self._one.expand(rows, 1),
            "v_descale": self._scale.expand(rows, 1),
        }
