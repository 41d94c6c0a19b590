"""Which decode settings this server's CUDA graphs have room for.

vLLM runs one graph a step, for all of its rows or for none. So a request that no graph holds would take every row
beside it out of the graphs; it is refused instead, and a change of the defaults that would lead there too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.request import configured_method
from vllm_sparse.config.server import server_config
from vllm_sparse.methods.decode import BatchDecodeMethod

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig

    from vllm_sparse.config.request import ParamsByLength
    from vllm_sparse.config.settings import ServerConfig
    from vllm_sparse.methods.decode import DecodeMethod


def has_decode_graphs(vllm_config: VllmConfig) -> bool:
    """Whether sparse decode steps of this server have CUDA graphs; verification of drafted tokens is dense."""
    # Imported here: the platform must not be chosen while plugins are loaded.
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform

    return bool(
        server_config(vllm_config).decode_in_batches
        and current_platform.is_cuda()
        and vllm_config.use_v2_model_runner
        and vllm_config.speculative_config is None
        and vllm_config.compilation_config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
    )


def why_not_held(start: ServerConfig, asked: DecodeMethod, max_seq_len: int) -> str | None:
    """Why the graphs of a server have no room for a decode method's rows; None if they have.

    None too where they have no room for the method as the server itself configures it: then it was the operator's
    choice that its rows decode without them.

    Args:
        start: the configuration that the server was started with, which sizes its graphs' memory.
        asked: the method, with the knobs asked for.
        max_seq_len: of the longest request.
    """
    own = configured_method(start, "decode", asked.name)
    room = start.decode_list_tokens
    if not isinstance(own, BatchDecodeMethod) or not own.serves(own, max_seq_len) or own.longest_list_tokens > room:
        return None
    if not own.serves(asked, max_seq_len):
        return "this server's CUDA graphs and their memory do not serve these knobs"
    assert isinstance(asked, BatchDecodeMethod), "a method serves its own kind"
    if asked.longest_list_tokens > room:
        return (
            f"lists of {asked.longest_list_tokens} tokens are longer than decode_list_tokens, {room}, of this server's "
            "CUDA graphs"
        )
    return None


def check_request(vllm_config: VllmConfig, extras: Mapping[str, Any], settings: ParamsByLength) -> None:
    """Refuse a request whose decode rows no graph of this server has room for, at any length of its prompt.

    Args:
        vllm_config: the server's configuration.
        extras: the request's ``vllm_xargs``.
        settings: what it resolves to.

    Raises:
        SparseParamsError: it is such a request.
    """
    if not has_decode_graphs(vllm_config):
        return
    for _, params in settings.tiers:
        if params.decode is None:
            continue
        name = params.decode.name
        reason = why_not_held(server_config(vllm_config), params.decode, vllm_config.model_config.max_model_len)
        if reason is None:
            continue
        given = {key: value for key, value in extras.items() if key.startswith(f"{name}_")}
        given = given or {key: value for key, value in extras.items() if key in ("sparse_preset", "sparse_decode")}
        key, value = next(iter(given.items()), ("sparse_decode", name))
        asked = ", ".join(f"{key} is {value!r}" for key, value in given.items()) or f"{key} is {value!r}"
        raise SparseParamsError(
            key,
            value,
            f"{asked}: {reason}, and one row without them would take all rows beside it out of theirs; ask for less, "
            f"or start the server with room for it (--additional-config, object sparse: decode_list_tokens, or these "
            f'knobs in {name}), or with "decode_in_batches": false, which serves decode rows one by one',
        )
