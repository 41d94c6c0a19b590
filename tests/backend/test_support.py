"""Servers that the backend refuses, with what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.serving.multimodal_models import write_prefix_model
from vllm_sparse.backend.support import check_server

MODEL = str(Path(__file__).parents[2] / "loadtest" / "model" / "weights")


def test_pooling_models_are_refused_for_what_they_are() -> None:
    """Their runner loads no logits processors, which is not the installation's fault."""
    config = EngineArgs(model=MODEL, runner="pooling").create_engine_config()
    with pytest.raises(ValueError, match=r"does not support pooling models.*serve without --attention-backend sparse"):
        check_server(config)


def test_images_read_in_both_directions_are_refused_and_their_models_text_is_not(tmp_path: Path) -> None:
    """While the command line is read, by the name of the model's kind."""
    settings: dict[str, Any] = {"model": str(write_prefix_model(tmp_path / "model")), "max_model_len": 2048}
    refusal = r"in this model \(paligemma\) the tokens of an image attend to each other in both directions.*"
    with pytest.raises(ValueError, match=f"{refusal}--language-model-only, or serve it without --attention-backend"):
        EngineArgs(**settings, attention_backend="sparse").create_engine_config()
    EngineArgs(**settings).create_engine_config()
    check_server(EngineArgs(**settings, attention_backend="sparse", language_model_only=True).create_engine_config())
