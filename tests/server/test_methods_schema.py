"""The JSON schema of a request's extras against what the server takes, over random extras."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import DENSE, METHODS, PHASES, REQUEST_KEYS, former_keys, knob_schema
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.config.request import resolve_by_length
from vllm_sparse.config.server import check_settings
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.server.routes.methods import described, enabled, extras_schema, request_knobs

LAYERS, HEADS = 32, 32
CONFIGS = {
    "default": ServerConfig(),
    "all methods": ServerConfig(methods=METHODS),
    "sparse by default": ServerConfig(prefill="hip", decode="tidal", min_tokens=64, hip={"sink_tokens": 128}),
    "preset by default": check_settings({"preset": "balanced"}, LAYERS, HEADS),
    "preset and method by default": check_settings({"preset": "fast", "prefill": "hip"}, LAYERS, HEADS),
    "one method": ServerConfig(methods=("dhsa",), prefill="dhsa", dhsa={"density": 0.5}),
}
VALIDATORS = {name: jsonschema.Draft202012Validator(extras_schema(config)) for name, config in CONFIGS.items()}

KNOBS = [f"{name}_{knob}" for phase, known in PHASES.items() for name in known for knob in knob_schema(phase, name)]
FORMER = [key for phase, known in PHASES.items() for name in known for key in former_keys(phase, name)]
KEYS = st.one_of(
    st.sampled_from([*REQUEST_KEYS, "sparse_budget", "SparseX", "seed"]),
    st.sampled_from(KNOBS),
    st.sampled_from(FORMER),
    st.from_regex(r"(sparse|hip|tidal|HIP)[_a-zA-Z-]{0,6}", fullmatch=True),
)
VALUES = st.one_of(
    st.sampled_from([DENSE, *METHODS, *PRESETS, "kv_head", "query_head", "layer", "everything", "list", "page", ""]),
    st.integers(-2, 200),
    # No whole ones: 1.0 is an integer in JSON schema.
    st.sampled_from([0.5, 0.25, 1.5, -0.5]),
    st.lists(st.integers(-1, 400), max_size=4),
    st.sampled_from([True, False]),
)


def taken(extras: dict[str, Any], config: ServerConfig) -> tuple[bool, str]:
    """Whether the server takes extras, and why not."""
    try:
        resolve_by_length(extras, config, LAYERS)
    except SparseParamsError as error:
        return False, str(error)
    return True, ""


# Refusals that the schema has to know; the others are of what knobs have to meet together, or of the model's depth.
EXPRESSIBLE = (
    "is allowed",
    "allowed are",
    "0 or more",
    "is no knob",
    "is no setting",
    "is a knob of",
    "of the server",
    "is set too",
    "does not enable",
)
BOOLEAN_KNOBS = ("flexprefill_faithful", "sale_page_bounds")


@settings(max_examples=300)
@given(st.sampled_from(list(CONFIGS)), st.dictionaries(KEYS, VALUES, max_size=4))
def test_the_schema_takes_what_the_server_takes(name: str, extras: dict[str, Any]) -> None:
    # vLLM makes 1 of true, so that the server has to take both; a client that has a schema sends true.
    sent = {key: bool(value) if key in BOOLEAN_KNOBS and value in (0, 1) else value for key, value in extras.items()}
    valid = VALIDATORS[name].is_valid(sent)
    good, why = taken(sent, CONFIGS[name])
    if good:
        assert valid, sent
    elif any(words in why for words in EXPRESSIBLE):
        assert not valid, (sent, why)


# Presets, methods that they pick and some of their knobs, so that most draws name two that have to do with each other.
OF_PRESETS = st.fixed_dictionaries(
    {},
    optional={
        "sparse_preset": st.sampled_from([DENSE, *PRESETS, "turbo"]),
        "sparse_prefill": st.sampled_from([DENSE, "sale", "dhsa", "hip"]),
        "sparse_decode": st.sampled_from([DENSE, "blocktopk", "tidal", "hip"]),
        "sale_tau": st.sampled_from([0.5, 0.25]),
        "dhsa_density": st.sampled_from([0.5, 0.25]),
        "blocktopk_budget_tokens": st.integers(90, 200),
        "hip_sink_tokens": st.integers(0, 64),
    },
)


@settings(max_examples=300)
@given(st.sampled_from(list(CONFIGS)), OF_PRESETS)
def test_the_schema_takes_presets_and_knobs_that_the_server_takes(name: str, extras: dict[str, Any]) -> None:
    good, why = taken(extras, CONFIGS[name])
    assert VALIDATORS[name].is_valid(extras) == good, (extras, why)


def test_presets_are_described_with_what_they_pick() -> None:
    config = CONFIGS["default"]
    for name, preset in PRESETS.items():
        told = described(preset, config)
        assert told["description"] == preset.description
        assert told["quality"] == preset.quality
        assert told["tiers"][0] == {
            "from_prompt_tokens": 0,
            "vllm_xargs": {"sparse_prefill": DENSE, "sparse_decode": DENSE},
        }
        assert len(told["tiers"]) == len(preset.tiers) + 1
        for tier in told["tiers"]:
            # A client may send what a tier stands for.
            VALIDATORS["all methods"].validate(tier["vllm_xargs"])
        missing = any(told["methods_not_enabled"].values())
        assert taken({"sparse_preset": name}, config)[0] != missing


@pytest.mark.parametrize("name", CONFIGS)
def test_each_knob_is_valid_with_its_method_and_at_its_default(name: str) -> None:
    config = CONFIGS[name]
    for phase in PHASES:
        for method in enabled(phase, config):
            knobs = request_knobs(phase, method, config)
            for key, schema in knobs.items():
                assert schema["description"], key
                if "default" not in schema:
                    continue
                extras = {f"sparse_{phase}": method, key: schema["default"]}
                # As JSON has it.
                extras = {key: list(value) if isinstance(value, tuple) else value for key, value in extras.items()}
                VALIDATORS[name].validate(extras)
                assert taken(extras, config) == (True, "")
                other = {"sparse_prefill": DENSE, "sparse_decode": DENSE, key: extras[key]}
                assert not VALIDATORS[name].is_valid(other)


@pytest.mark.parametrize("name", CONFIGS)
def test_schemas_are_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(extras_schema(CONFIGS[name]))


def test_defaults_are_the_servers() -> None:
    schema = extras_schema(CONFIGS["preset and method by default"])["properties"]
    assert schema["sparse_preset"]["default"] == "fast"
    assert schema["sparse_prefill"]["default"] == "hip"
    assert "default" not in schema["sparse_decode"]
    schema = extras_schema(CONFIGS["sparse by default"])["properties"]
    assert schema["sparse_prefill"]["default"] == "hip"
    assert schema["sparse_min_tokens"]["default"] == 64
    assert schema["hip_sink_tokens"]["default"] == 128
    assert "blocktopk_budget_tokens" not in schema


def test_phases_that_share_a_knob_agree_on_it() -> None:
    """The schema of one is that of both."""
    config = CONFIGS["all methods"]
    for name in METHODS:
        if all(name in known for known in PHASES.values()):
            prefill, decode = (request_knobs(phase, name, config) for phase in PHASES)
            for key in prefill.keys() & decode.keys():
                assert constraints_of(prefill[key]) == constraints_of(decode[key]), key


def constraints_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {keyword: value for keyword, value in schema.items() if keyword not in ("description", "default")}
