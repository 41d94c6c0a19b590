"""Former names of knobs, which requests and configurations may use for one release after a knob was renamed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import METHODS, former_keys, phases_of, split_key

logger = logging.getLogger("vllm.sparse")


def present_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A ``"sparse"`` object of the server's configuration, all knobs under their present names.

    Raises:
        SparseParamsError: a knob is given by its former and by its present name.
    """
    return {
        key: _present_knobs(key, value) if key in METHODS and isinstance(value, Mapping) else value
        for key, value in settings.items()
    }


def present_extras(extras: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Sampling extras of a request, all knobs under their present names.

    Returns:
        The extras, and the former key of each that was given by it, by its present key.

    Raises:
        SparseParamsError: a knob is given by its former and by its present name.
    """
    renamed: dict[str, Any] = {}
    former: dict[str, str] = {}
    for key, value in extras.items():
        present = _present_key(key)
        if present != key:
            if present in extras:
                raise SparseParamsError(
                    key, value, f"{key} is the former name of {present}, which is set too; set {present} alone"
                )
            _log_once(key, present)
            former[present] = key
        renamed[present] = value
    return renamed, former


def _present_knobs(name: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs in a method's object of the configuration, as `present_extras` of a request."""
    keys, _ = present_extras({f"{name}_{knob}": value for knob, value in knobs.items()})
    return {key.removeprefix(f"{name}_"): value for key, value in keys.items()}


def _present_key(key: str) -> str:
    """The key under which a knob is known now; other keys stay as they are."""
    name, _ = split_key(key)
    for phase in phases_of(name):
        key = former_keys(phase, name).get(key, key)
    return key


@functools.cache
def _log_once(former: str, present: str) -> None:
    logger.warning(
        "Sparse attention: %s is now called %s; the former name works in this release only.", former, present
    )
