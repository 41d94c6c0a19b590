"""The methods by name.

A method is added with its file, its classes here (one for each phase that it serves) and its entry in
``tests/methods/matrix.py``. Server configuration, request keys, routes and the chart's schema follow from here.
"""

from __future__ import annotations

from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.dhsa import Dhsa
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.oracle import Oracle, OracleDecode
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.random_pages import RandomDecode, RandomPages
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.streaming import Streaming, StreamingDecode
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.methods.token_topk import TokenTopk

_CLASSES: tuple[type[PrefillMethod | DecodeMethod], ...] = (
    *(FlexPrefill, Sale, Dhsa, Hip),
    *(Tidal, HipDecode, BlockTopk, TokenTopk),
    *(Streaming, StreamingDecode),
    *(RandomPages, RandomDecode, Oracle, OracleDecode),
)
PREFILL_METHODS: dict[str, type[PrefillMethod]] = {
    method.name: method for method in _CLASSES if issubclass(method, PrefillMethod)
}
DECODE_METHODS: dict[str, type[DecodeMethod]] = {
    method.name: method for method in _CLASSES if issubclass(method, DecodeMethod)
}
_OPTIONAL = {method.name for method in _CLASSES if not method.enabled_by_default}
DEFAULT_METHODS = tuple(dict.fromkeys(method.name for method in _CLASSES if method.name not in _OPTIONAL))
# Their summaries need blocks that this process wrote.
SUMMARISING_METHODS = tuple(name for name, method in DECODE_METHODS.items() if method().summaries is not None)
