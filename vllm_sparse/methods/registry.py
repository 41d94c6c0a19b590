"""The methods by name. Adding one: its file, its line here, its entry in ``tests/methods/matrix.py``."""

from __future__ import annotations

from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.tidal import Tidal

PREFILL_METHODS: dict[str, type[PrefillMethod]] = {method.name: method for method in (FlexPrefill, Sale, Dhsa, Hip)}
DECODE_METHODS: dict[str, type[DecodeMethod]] = {method.name: method for method in (Tidal, HipDecode, BlockTopk)}
# Their summaries take memory beside the KV cache and need blocks that this process wrote: a server has to enable them.
SUMMARISING_METHODS = tuple(name for name, method in DECODE_METHODS.items() if method().summaries is not None)
