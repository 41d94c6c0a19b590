"""The server's configuration while it runs: that of the command line, and what an operator has changed since.

Requests are resolved where they are admitted, in the API servers, and carry the result to the workers. So a change is
complete once all API servers of a server see it. They share a private directory with one file, which is replaced as a
whole: the renaming makes a change count for the next request of each of them, or, where it fails, for none. An API
server that starts later reads the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse.config.former_names import present_settings
from vllm_sparse.config.names import METHODS, PHASES
from vllm_sparse.config.request import configured_method, resolve_by_length
from vllm_sparse.config.server import check_settings
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.registry import DECODE_METHODS
from vllm_sparse.server.decode_room import why_not_held
from vllm_sparse.shared_directory import announce

# Handed to child processes through the environment, not meant to be set by users.
DIRECTORY_VARIABLE = "SPARSE_CONFIG_DIRECTORY"
# Of the entry point that VLLM_PLUGINS has to name.
ROUTES_NAME = "sparse"
FILE, LOCK = "config.json", "lock"

# The others size memory and CUDA graphs, or are read by the workers at their start.
CHANGEABLE_SETTINGS = ("preset", "prefill", "decode", "min_tokens", "min_recall", "unprofitable", "limits", *METHODS)


class FixedSettingError(ValueError):
    """A change that a running server cannot make. The message says why and what to do instead."""


class OutdatedError(ValueError):
    """The configuration is no longer the one that a change was meant for."""


@dataclass(frozen=True)
class RunningConfig:
    """A configuration that requests are resolved against.

    Attributes:
        version: 1 at the start, one more with each change.
        config: the configuration.
    """

    version: int
    config: ServerConfig

    @property
    def etag(self) -> str:
        """HTTP entity tag: another one for another configuration, after a restart of the server too."""
        digest = hashlib.sha256(self.config.model_dump_json().encode()).hexdigest()[:8]
        return f'"{self.version}-{digest}"'


@dataclass(frozen=True)
class Served:
    """What a configuration has to suit.

    Attributes:
        start: the configuration of the command line.
        num_layers: attention layers of the model that may be sparse.
        num_query_heads: query heads of the model, those of all processes.
        max_seq_len: of the longest request.
        decode_graphs: sparse decode steps have CUDA graphs.
        layers: which backend serves which layers (`vllm_sparse.backend.layer_table`), as JSON.
    """

    start: ServerConfig
    num_layers: int
    num_query_heads: int
    max_seq_len: int
    decode_graphs: bool
    layers: Sequence[Mapping[str, Any]] = ()


def announce_directory() -> None:
    """In the process that starts the others: make the directory that API servers share; idempotent.

    Only where vLLM is told to load this plugin's routes: nothing else changes the configuration.
    """
    from vllm import envs

    if ROUTES_NAME in (envs.VLLM_PLUGINS or ()):
        announce(DIRECTORY_VARIABLE, "vllm-sparse-config-")


def running_config(start: ServerConfig) -> RunningConfig:
    """The configuration that counts now.

    Args:
        start: the configuration of the command line.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None:
        return RunningConfig(1, start)
    try:
        text = Path(directory, FILE).read_bytes()
    except FileNotFoundError:
        return RunningConfig(1, start)
    return _parse(text)


@functools.lru_cache(maxsize=1)
def _parse(text: bytes) -> RunningConfig:
    """Read the file; cached, for it is read with every request and rarely changes."""
    held = json.loads(text)
    return RunningConfig(held["version"], ServerConfig.model_validate(held["config"]))


def change_config(
    served: Served, settings: Mapping[str, Any], if_match: str | None
) -> tuple[RunningConfig, RunningConfig]:
    """Replace the configuration, for all API servers or for none.

    Args:
        served: what it has to suit.
        settings: as in the ``"sparse"`` object of ``--additional-config``; what they leave out is as on the command
            line.
        if_match: entity tags, one of which the present configuration must have; None: any may.

    Returns:
        The configuration that counted before and the one that counts now; the same where nothing changes.

    Raises:
        OutdatedError: another one counts.
        FixedSettingError: a setting cannot change while the server runs.
        ValueError: the settings are wrong, as at the start.
    """
    directory = Path(os.environ[DIRECTORY_VARIABLE])
    with _locked(directory):
        old = running_config(served.start)
        if if_match is not None and if_match != "*" and old.etag not in map(str.strip, if_match.split(",")):
            raise OutdatedError(
                f"If-Match is {if_match}, but the configuration is {old.etag}; read it again and decide anew"
            )
        settings = present_settings(settings)
        _check_fixed(served.start, settings)
        config = check_settings(_overlaid(served.start, settings), served.num_layers, served.num_query_heads)
        _check_graphs(served, config)
        if config == old.config:
            return old, old
        new = RunningConfig(old.version + 1, config)
        held = {"version": new.version, "config": config.model_dump(mode="json")}
        unfinished = directory / f"{FILE}.new"
        unfinished.write_text(json.dumps(held))
        unfinished.replace(directory / FILE)
        return old, new


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory against other processes and threads; the system lets go when a holder dies."""
    with (directory / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _overlaid(start: ServerConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over those of the command line, knob by knob."""
    document = start.model_dump()
    for name, value in settings.items():
        knobs = document.get(name)
        document[name] = {**knobs, **value} if isinstance(knobs, dict) and isinstance(value, dict) else value
    return document


def _check_fixed(start: ServerConfig, settings: Mapping[str, Any]) -> None:
    """Refuse settings that memory, CUDA graphs or files depend on, before a file that they name is opened.

    Raises:
        FixedSettingError: such a setting differs from the command line's.
    """
    fixed: dict[tuple[str, ...], Any] = {
        (name,): value for name, value in start.model_dump(mode="json").items() if name not in CHANGEABLE_SETTINGS
    }
    for phase, methods in PHASES.items():
        for name in methods:
            method = configured_method(start, phase, name)
            fixed |= {(name, knob): getattr(method, knob) for knob in method.server_knobs}
    for path, value in fixed.items():
        given: Any = settings
        for name in path:
            given = given.get(name, value) if isinstance(given, Mapping) else value
        if given != value:
            raise FixedSettingError(
                f"sparse.{'.'.join(path)} is {given!r}; it is {value!r} while this server runs, because memory, checks "
                "or files of its start depend on it; start the server again with it in --additional-config"
            )


def _check_graphs(served: Served, config: ServerConfig) -> None:
    """Refuse defaults with which a method would decode without the CUDA graphs that the server has for it.

    Raises:
        FixedSettingError: they are such.
    """
    if not served.decode_graphs:
        return
    changed: list[tuple[str, DecodeMethod]] = [
        (f"object sparse.{name}", _decode_method(config, name)) for name in DECODE_METHODS if name in config.methods
    ]
    by_default = resolve_by_length({}, config, served.num_layers)
    changed += [
        (f"sparse.preset {config.preset}", params.decode) for _, params in by_default.tiers if params.decode is not None
    ]
    for setting, after in changed:
        found = why_not_held(served.start, after, served.max_seq_len)
        if found is None:
            continue
        raise FixedSettingError(
            f"{setting}: {found}, so requests would decode without them, slower than before; start the "
            "server again with it in --additional-config"
        )


def _decode_method(config: ServerConfig, name: str) -> DecodeMethod:
    """A decode method with the knobs that a configuration gives it."""
    method = configured_method(config, "decode", name)
    assert isinstance(method, DecodeMethod)
    return method
