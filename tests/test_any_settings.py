"""Whatever JSON clients or operators send as settings is taken, or refused with what is wrong; nothing else happens."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError

from tests.server.test_decode_room import server
from vllm_sparse.config.messages import MOST_CHARACTERS, SparseParamsError, readable
from vllm_sparse.config.names import METHODS, PHASES, REQUEST_KEYS, former_keys, knob_schema
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.config.request import deserialize, resolve_by_length
from vllm_sparse.config.server import check_settings
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.server.admission import as_vllm_error, resolve_for
from vllm_sparse.server.door import check_body
from vllm_sparse.server.routes.methods import extras_schema
from vllm_sparse.server.runtime_config import Served, change_config

LAYERS, HEADS = 8, 4
SERVERS = [
    server(),
    server(methods=list(METHODS)),
    server(preset="fast"),
    server(methods=list(METHODS), limits={"budget_tokens": 4096, "list_per": "kv_head", "stages": 2}),
]

# Lone surrogates too: JSON can write them, UTF-8 cannot.
TEXTS = st.one_of(st.text(max_size=8), st.text(st.characters(categories=["Cs", "Cc"]), max_size=4))
NUMBERS = st.one_of(
    st.integers(-3, 5000), st.sampled_from([1 << 24, 1 << 63, 1 << 70, -(1 << 70)]), st.floats(), st.floats(0, 1)
)
WORDS = st.sampled_from(["dense", "kv_head", "query_head", "layer", "", *METHODS, *PRESETS])
ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
KNOBS = {
    name: [knob for phase, known in PHASES.items() if name in known for knob in knob_schema(phase, name)]
    for name in METHODS
}
ALL_KNOBS = sorted({knob for knobs in KNOBS.values() for knob in knobs})
FORMER = [key for phase, known in PHASES.items() for name in known for key in former_keys(phase, name)]
KEYS = st.one_of(
    st.sampled_from(REQUEST_KEYS),
    st.sampled_from([f"{name}_{knob}" for name, knobs in KNOBS.items() for knob in knobs]),
    st.sampled_from([*FORMER, "sparse_resolved", "sparse-decode", "SPARSE", "hipster"]),
    TEXTS,
)
CHOICES = st.fixed_dictionaries(
    {}, optional={f"sparse_{phase}": st.sampled_from(["dense", *known]) for phase, known in PHASES.items()}
)
EXTRAS = st.builds(lambda choices, others: {**choices, **others}, CHOICES, st.dictionaries(KEYS, ANY, max_size=3))
NAMES = st.sampled_from([*ServerConfig.model_fields, "unknown"])
SETTINGS = st.one_of(
    ANY,
    st.dictionaries(
        NAMES,
        st.one_of(ANY, st.dictionaries(st.sampled_from(ALL_KNOBS), ANY, max_size=2)),
        max_size=3,
    ),
)


@settings(max_examples=2000)
@example({"sparse_prefill": "\ud800"}, SERVERS[0])
@example({"sparse_\ud800": "x" * 10_000}, SERVERS[0])
@given(EXTRAS, st.sampled_from(SERVERS))
def test_any_extras_are_taken_or_refused_with_their_key(extras: dict[str, Any], vllm_config: Any) -> None:
    try:
        found = resolve_for(vllm_config, extras)
    except SparseParamsError as error:
        check_answer(as_vllm_error(error))
        refused = error
    else:
        for _, params in found.tiers:
            assert deserialize(params.serialize()) == params
        return
    assert refused.key in extras or refused.key in ("sparse_prefill", "sparse_preset")
    assert readable(refused.key) in str(refused)


def check_answer(error: Exception) -> None:
    """A refusal can be written as JSON in UTF-8, and is not a page of what was sent."""
    text = str(error)
    assert text.encode()
    # The message, and vLLM adds parameter and value.
    assert len(text) < 3 * MOST_CHARACTERS


@settings(max_examples=1000)
@example({"\ud800": 1})
@example({"methods": ["\udfff"]})
@given(SETTINGS)
def test_any_configuration_is_taken_or_refused(given_settings: Any) -> None:
    try:
        config = check_settings(given_settings, LAYERS, HEADS)
    except ValueError as error:
        check_answer(error)
        return
    # What is taken, routes tell, and other processes read.
    assert ServerConfig.model_validate_json(config.model_dump_json()) == config
    assert json.dumps(extras_schema(config), allow_nan=False)
    assert resolve_by_length({}, config, LAYERS).at(1 << 20)


@pytest.fixture(scope="module", autouse=True)
def _config_directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_CONFIG_DIRECTORY", str(tmp_path_factory.mktemp("config")))
        yield


@settings(max_examples=500)
@example({"\ud800": "x" * 10_000})
@given(st.dictionaries(NAMES, ANY, max_size=3))
def test_any_change_is_made_or_refused(changes: dict[str, Any]) -> None:
    served = Served(ServerConfig(methods=METHODS), LAYERS, HEADS, 4096, decode_graphs=True)
    try:
        _, new = change_config(served, changes, None)
    except ValueError as error:
        check_answer(error)
        return
    assert resolve_by_length({}, new.config, LAYERS).at(1 << 20)


@settings(max_examples=500)
@example({"sparse_\ud800": "x" * 10_000})
@given(st.dictionaries(st.one_of(KEYS, st.sampled_from(["vllm_xargs", "sampling_params"])), ANY, max_size=4))
def test_any_body_passes_the_door_or_is_refused(body: dict[str, Any]) -> None:
    class Request(SimpleNamespace):
        model_fields: ClassVar = {"vllm_xargs": None}

    request = Request(vllm_xargs={})
    try:
        check_body(body, request)
    except VLLMValidationError as error:
        check_answer(error)
