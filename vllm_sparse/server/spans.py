"""Sparse settings on the spans that vLLM makes of requests, where its OpenTelemetry is on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vllm_sparse.config.names import DENSE
from vllm_sparse.config.request import SparseParams
from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod
from vllm_sparse.step.eligibility import (
    DenseReason,
    longest_dense_seq_len,
    why_decode_is_dense,
    why_prefill_is_dense,
)

PREFIX = "vllm_sparse"


def span_attributes(params: SparseParams, prompt_tokens: int, seq_len: int, token_lists: bool) -> dict[str, Any]:
    """What a request's span says of sparse attention.

    Args:
        params: what the request asked for, defaults applied.
        prompt_tokens: of its prompt.
        seq_len: of its last decode step.
        token_lists: decode steps read lists of single tokens, so that settings and context tell how many they read.

    Returns:
        Values of OpenTelemetry's types by attribute. ``...fallback`` says that all of a phase ran dense for its
        length; other reasons are known to the workers alone, whose metrics count them.
    """
    attributes: dict[str, Any] = {}
    for phase, method, tokens in (
        ("prefill", params.prefill, prompt_tokens),
        ("decode", params.decode, seq_len),
    ):
        attributes[f"{PREFIX}.{phase}.method"] = DENSE if method is None else method.name
        if method is None:
            continue
        for knob, value in dataclasses.asdict(method).items():  # type: ignore[arg-type]
            if value is not None:
                attributes[f"{PREFIX}.{phase}.{knob}"] = value
        attributes[f"{PREFIX}.{phase}.min_tokens"] = params.min_tokens
        if isinstance(method, DecodeMethod):
            reason = why_decode_is_dense(method, params.min_tokens, tokens)
        else:
            # Taken as one chunk: how the scheduler cuts a prompt is known to the workers alone.
            reason = why_prefill_is_dense(method, params.min_tokens, tokens, tokens)
        if reason is DenseReason.SHORT_CONTEXT:
            attributes[f"{PREFIX}.{phase}.fallback"] = reason.value
    if token_lists and isinstance(params.decode, BatchDecodeMethod):
        first_sparse = longest_dense_seq_len(params.decode, params.min_tokens) + 1
        sparse = np.arange(max(prompt_tokens + 1, first_sparse), seq_len + 1)
        if sparse.size:
            density = params.decode.list_tokens(sparse) / sparse
            if params.decode.dense_every_steps:
                density[sparse % params.decode.dense_every_steps == 0] = 1
            attributes[f"{PREFIX}.decode.density"] = float(density.mean())
    return attributes
