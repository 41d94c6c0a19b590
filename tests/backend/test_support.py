"""Servers that the backend refuses, with what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_sparse.backend.support import check_server

MODEL = str(Path(__file__).parents[2] / "loadtest" / "model" / "weights")


def test_pooling_models_are_refused_for_what_they_are() -> None:
    """Their runner loads no logits processors, which is not the installation's fault."""
    config = EngineArgs(model=MODEL, runner="pooling").create_engine_config()
    with pytest.raises(ValueError, match=r"does not support pooling models.*serve without --attention-backend sparse"):
        check_server(config)
