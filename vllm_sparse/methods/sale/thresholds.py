"""SALE's thresholds per layer and query head, and the file that holds them: found by calibration."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from vllm_sparse.host_copy import to_device
from vllm_sparse.methods.file import MethodFile, read

Threshold = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Calibration:
    """Contents of a calibration file.

    Attributes:
        model: what was calibrated.
        layers: attention layers.
        heads: query heads of a layer.
        error_bound: largest relative error of a head's output over a prompt.
        prompts: tokens of each prompt.
        thresholds: ``[layers][heads]``; 0 leaves a head dense.
        version: of the format.
    """

    model: str
    layers: int
    heads: int
    error_bound: float
    prompts: list[int]
    thresholds: list[list[Threshold]]
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        shape = {len(self.thresholds), *(len(heads) for heads in self.thresholds)}
        if len(self.thresholds) != self.layers or any(len(heads) != self.heads for heads in self.thresholds):
            raise ValueError(f"thresholds are not {self.layers} layers of {self.heads} heads, lengths are {shape}")

    def save(self, path: Path) -> None:
        """Write the file, one layer a line."""
        fields = asdict(self)
        rows = ",\n".join("  " + json.dumps(heads) for heads in fields.pop("thresholds"))
        head = json.dumps(fields, indent=1).removesuffix("\n}")
        path.write_text(f'{head},\n "thresholds": [\n{rows}\n ]\n}}\n')


@functools.lru_cache
def load(path: str) -> MethodFile[Calibration]:
    """Read a calibration file, once per process: a file that changes under a running server changes nothing.

    Raises:
        ValueError: it cannot be read or is no calibration file.
    """
    return read(path, Calibration, "SALE calibration")


def log_thresholds(taus: list[float] | tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Logarithms of thresholds, float32; minus infinity for 0."""
    return to_device(torch.tensor([math.log(tau) if tau > 0 else -math.inf for tau in taus]), device)
