"""Which backend serves which layers of a model, and why: for the log, for the API, and to number sparse layers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm_sparse.config.model_layers import held_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.sparse")

BACKEND = "SPARSE"


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind.

    Attributes:
        kind: what they attend to.
        layers: their numbers in the model, from 0.
        backend: vLLM's name of the backend that serves them.
        why: why that one.
    """

    kind: str
    layers: tuple[int, ...]
    backend: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """The kind as the API tells it."""
        return asdict(self)

    def __str__(self) -> str:
        """One line for the log."""
        return f"{self.kind}: {self.backend} serves layers {_ranges(self.layers)}, because {self.why}"


def layer_table(vllm_config: VllmConfig) -> list[LayerKind]:
    """Kinds of layers of the model that this process holds, in the order of their first layers.

    Args:
        vllm_config: the server's configuration, with the layers that vLLM made.
    """
    found: dict[tuple[str, str, str], list[int]] = {}
    for layer_name, layer in _attention_layers(vllm_config).items():
        kind, why = _kind_of(layer)
        found.setdefault((kind, _backend_name(layer), why), []).append(_layer_index(layer_name))
    return [LayerKind(kind, tuple(sorted(at)), backend, why) for (kind, backend, why), at in found.items()]


def merged(tables: Iterable[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One table of the model from those of its processes, as JSON; stages of a pipeline hold some of the layers each.

    Args:
        tables: of all processes, in their order.
    """
    found: dict[tuple[str, str, str], set[int]] = {}
    for kind in itertools.chain.from_iterable(tables):
        found.setdefault((kind["kind"], kind["backend"], kind["why"]), set()).update(kind["layers"])
    return [LayerKind(kind, tuple(sorted(at)), backend, why).as_json() for (kind, backend, why), at in found.items()]


def sparse_layer_names(vllm_config: VllmConfig) -> dict[int, str]:
    """Layers that this backend serves in this process, by their order in the model, which is how methods number them.

    Args:
        vllm_config: the server's configuration, with the layers that vLLM made.

    Returns:
        Names by number; numbers are those of `held_layers`.

    Raises:
        ValueError: they are not those that the model's configuration tells.
    """
    names = [name for name, layer in _attention_layers(vllm_config).items() if _is_sparse(layer)]
    held = held_layers(vllm_config)
    if len(names) != len(held):
        raise ValueError(
            f"attention backend sparse serves {len(names)} layers of this model, whose configuration tells of "
            f"{len(held)} with full attention: which layers those are is not known; serve the model without "
            "--attention-backend sparse"
        )
    return dict(zip(held, sorted(names, key=_layer_index), strict=True))


def log_layer_table(vllm_config: VllmConfig) -> None:
    """Say once in a process which backend serves which layers, one line for each kind."""
    _log(tuple(map(str, layer_table(vllm_config))))


@lru_cache
def _log(lines: tuple[str, ...]) -> None:
    """Once, though vLLM makes builders several times."""
    for line in lines:
        logger.info("Sparse attention: %s", line)


def _attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return {name: layer for name, layer in layers.items() if not layer.is_draft_layer}


def _is_sparse(layer: Any) -> bool:
    return _backend_name(layer) == BACKEND


def _backend_name(layer: Any) -> str:
    name: str = layer.get_attn_backend().get_name()
    return name


def _kind_of(layer: Any) -> tuple[str, str]:
    """What a layer attends to, and why its backend serves it."""
    if hasattr(layer, "mamba_type"):
        return "state-space or linear attention", "it keeps a state and no keys, so there are none to choose"
    if hasattr(layer, "attention_chunk_size"):
        size = layer.attention_chunk_size
        return f"chunked-local attention of {size} tokens", f"it reads the chunk of {size} tokens that a query is in"
    window = getattr(layer, "sliding_window", None)
    details = [f"a soft cap of {cap:g}"] if (cap := _soft_cap(layer)) else []
    details += ["sinks"] if getattr(layer, "has_sink", False) else []
    suffix = f" with {' and '.join(details)}" if details else ""
    if window is not None:
        return f"sliding window of {window} tokens{suffix}", f"it reads no more than the last {window} tokens"
    if _is_sparse(layer):
        return f"full attention{suffix}", "requests may choose what it reads; without that it runs vLLM's own kernel"
    return f"{type(layer).__name__}{suffix}", "it is no layer with plain full attention"


def _soft_cap(layer: Any) -> float:
    """On the layer's attention logits; 0: none."""
    return float(getattr(getattr(layer, "impl", None), "logits_soft_cap", 0) or 0)


def _layer_index(layer_name: str) -> int:
    """The first number in a name such as ``model.layers.5.self_attn.attn``."""
    return next((int(part) for part in layer_name.split(".") if part.isdecimal()), 0)


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers with runs drawn together, such as 0-4, 6."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)
