"""Which layers of a model may be sparse: those with full attention. All others run what vLLM picks for them.

Processes that never hold the model ask too, so the answer is read from the model's configuration; the worker compares
it with the layers that it made (`vllm_sparse.backend.layer_table`).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# As model configurations spell them in `layer_types` and `layers_block_type`.
FULL_KINDS = ("full_attention", "attention", "hybrid")
WINDOW_KINDS = ("sliding_attention",)


def sparse_layers(model_config: ModelConfig) -> int:
    """Attention layers that may be sparse, which are those that methods count: a model's layers with full attention.

    Args:
        model_config: vLLM's configuration of the model.
    """
    return len(full_layers(model_config.hf_text_config, model_config.get_total_num_hidden_layers()))


def held_layers(vllm_config: VllmConfig) -> range:
    """Of the layers that may be sparse, as methods count them, those that this process holds: all without a pipeline.

    Args:
        vllm_config: of the server, as a worker has it.
    """
    model = vllm_config.model_config
    full = full_layers(model.hf_text_config, model.get_total_num_hidden_layers())
    start, end = model.get_layers_start_end_indices(vllm_config.parallel_config)
    return range(bisect_left(full, start), bisect_left(full, end))


def full_layers(config: Any, total: int) -> list[int]:
    """Indices of a model's layers with full attention.

    Args:
        config: of the model's text part, as transformers reads it.
        total: layers of the model.
    """
    window = getattr(config, "sliding_window", None)
    # vLLM takes the window away where it is told to (--disable-sliding-window).
    full_kinds = FULL_KINDS if window else (*FULL_KINDS, *WINDOW_KINDS)
    kinds = layer_kinds(config)
    if kinds is not None:
        return [layer for layer, kind in enumerate(kinds[:total]) if kind in full_kinds]
    # Without kinds, a window is that of every layer.
    return [] if window else list(range(total))


def check_sparse_layers(model_config: ModelConfig) -> None:
    """Refuse a model of which no layer could be sparse.

    Args:
        model_config: vLLM's configuration of the model.

    Raises:
        ValueError: it is such a model.
    """
    if sparse_layers(model_config) == 0:
        raise ValueError(
            "attention backend sparse serves layers with full attention, and this model has none: each of its "
            f"{model_config.get_total_num_hidden_layers()} layers has a window or another kind of attention; serve it "
            "without --attention-backend sparse"
        )


def check_directions(model_config: ModelConfig) -> None:
    """Refuse a model in which the tokens of an image attend to each other in both directions.

    What a query reads of its context is chosen among the tokens before it. vLLM asks the backend too, layer by layer
    while the model is made, and says neither which models those are nor how their text is served.

    Args:
        model_config: vLLM's configuration of the model.

    Raises:
        ValueError: it is such a model, and the server takes images.
    """
    if model_config.is_mm_prefix_lm:
        raise ValueError(
            "attention backend sparse serves causal attention, and in this model "
            f"({model_config.hf_config.model_type}) the tokens of an image attend to each other in both directions; "
            "serve text alone with --language-model-only, or serve it without --attention-backend sparse"
        )


def layer_kinds(config: Any) -> list[str] | None:
    """The kind of each layer as the model's configuration spells it; None where it has one kind alone.

    Args:
        config: of the model's text part, as transformers reads it.
    """
    for name in ("layer_types", "layers_block_type"):
        kinds: list[str] | None = getattr(config, name, None)
        if kinds:
            return list(kinds)
    return None
