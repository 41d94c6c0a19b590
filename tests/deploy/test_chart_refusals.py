"""Wrong values are refused before anything is installed, with a message that names the setting."""

from __future__ import annotations

import json
from typing import Any

import helm_python
import jsonschema
import pytest

from tests.deploy.chart import CHART, one_model, refusal, render, server
from vllm_sparse.config.names import METHODS, PHASES, knob_schema

WRONG_SCHEMA: list[tuple[dict[str, Any], str]] = [
    # Typing errors on each level.
    ({"modelz": {}}, "modelz"),
    ({"networkPolicy": {"enable": True}}, "enable"),
    ({"monitoring": {"monitor": {"kinds": "PodMonitor"}}}, "kinds"),
    ({"modelDefaults": {"replica": 2}}, "replica"),
    (one_model(replica=2), "replica"),
    (one_model(probes={"startup": 60}), "startup"),
    (one_model(sparse={"prefil": "flexprefill"}), "prefil"),
    (one_model(sparse={"tidal": {"budgets": 64}}), "budgets"),
    (one_model(resources={"limit": {}}), "limit"),
    # Wrong types and values.
    (one_model(replicas="two"), "replicas"),
    (one_model(replicas=-1), "replicas"),
    (one_model(nodes=0), "nodes"),
    (one_model(sparse={"preset": "turbo"}), "preset"),
    (one_model(sparse={"prefill": "tidal"}), "prefill"),
    (one_model(sparse={"methods": ["quest"]}), "methods"),
    (one_model(sparse={"min_tokens": "8k"}), "min_tokens"),
    (one_model(sparse={"flexprefill": {"gamma": 1.5}}), "gamma"),
    (one_model(sparse={"flexprefill": {"query_block_tokens": 96}}), "query_block_tokens"),
    (one_model(cache={"kind": "hostPath"}), "kind"),
    (one_model(cache={"size": "lots"}), "size"),
    (one_model(image={"digest": "sha256:abc"}), "digest"),
    (one_model(image={"pullPolicy": "Sometimes"}), "pullPolicy"),
    (one_model(engine={"gpuMemoryUtilization": 1.2}), "gpuMemoryUtilization"),
    (one_model(drain={"requestSeconds": 0}), "requestSeconds"),
    (one_model(autoscaling={"kind": "cpu"}), "kind"),
    (one_model(service={"port": 70000}), "port"),
    (one_model(source={"hub": "https://hub.example.com/org/name"}), "hub"),
    ({"monitoring": {"rules": {"create": True}}}, "create"),
    ({"models": {"Llama_3.1": {"source": {"hub": "org/name"}}}}, "Llama_3.1"),
    (one_model(extraArgs=["enforce-eager"]), "extraArgs"),
    (one_model(env={"COUNT": 1}), "COUNT"),
    (one_model(additionalConfig={"sparse": {}}), "additionalConfig"),
    (one_model(loadTest={"enabled": True}), "enabled"),
    (one_model(loadTest={"run": "Before_Launch"}), "run"),
    (one_model(loadTest={"scenario": "smokey"}), "scenario"),
    (one_model(loadTest={"set": ["load.rates"]}), "set"),
    (one_model(loadTest={"deadlineSeconds": 0}), "deadlineSeconds"),
    (one_model(loadTest={"results": {"claim": "a"}}), "claim"),
    (one_model(loadTest={"resources": {"cpu": 1}}), "resources"),
]

WRONG_TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({}, "models is empty"),
    ({"models": {"m": {}}}, "models.m.source"),
    (one_model(source={"hub": "org/name", "claim": "models"}), "models.m.source"),
    (one_model(cache={"kind": "existingClaim"}), "models.m.cache"),
    (one_model(nodes=2, accelerator={"count": 0}), "models.m.nodes"),
    (one_model(rollout={"maxSurge": 0, "maxUnavailable": 0}), "models.m.rollout"),
    (one_model(autoscaling={"kind": "hpa", "minReplicas": 5}), "models.m.autoscaling"),
    (one_model(autoscaling={"kind": "hpa", "minReplicas": 0}), "models.m.autoscaling"),
    (one_model(autoscaling={"kind": "keda"}), "models.m.autoscaling"),
    (one_model(ingress={"enabled": True}), "models.m.ingress"),
    (one_model(httpRoute={"enabled": True}), "models.m.httpRoute"),
    # Secrets, and what has a setting of its own.
    (one_model(extraArgs=["--api-key=abc"]), "set models.m.apiKey instead"),
    (one_model(extraArgs=["--api_key", "--abc"]), "set models.m.apiKey instead"),
    (one_model(extraArgs=["--hf-token=abc"]), "set models.m.hubToken instead"),
    (one_model(extraArgs=["--enforce-eager", "--port=1"]), "set models.m.service.port instead"),
    (one_model(extraArgs=["--additional-config={}"]), "set models.m.sparse or additionalConfig instead"),
    (one_model(env={"VLLM_API_KEY": "abc"}), "set models.m.apiKey.existingSecret instead"),
    (one_model(env={"HF_TOKEN": "abc"}), "set models.m.hubToken.existingSecret instead"),
    (one_model() | {"fullnameOverride": "x" * 51}, "53 characters"),
    (one_model(loadTest={"run": "x" * 20}) | {"fullnameOverride": "x" * 40}, "models.m.loadTest"),
]


@pytest.mark.parametrize(("values", "named"), WRONG_SCHEMA, ids=str)
def test_the_schema_refuses(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmValuesError) as error:
        helm_python.Chart.load(CHART).validate_schema(values)
    assert named in str(error.value)


@pytest.mark.parametrize(("values", "named"), WRONG_TOGETHER, ids=str)
def test_the_templates_refuse(values: dict[str, Any], named: str) -> None:
    message = refusal(values)
    assert named in message
    assert "abc" not in message, "a secret in the wrong place is not repeated"


def test_other_arguments_pass() -> None:
    container = server(one_model(extraArgs=["--enforce-eager", "--block-size=32"]))
    assert container["args"][-2:] == ["--enforce-eager", "--block-size=32"]


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(json.loads((CHART / "values.schema.json").read_text()))


@pytest.mark.parametrize("method", METHODS)
def test_the_schema_bounds_every_knob(method: str) -> None:
    """A wrong type for each knob of each method is refused, the default accepted, under its former name too."""
    knobs = {
        knob: schema
        for phase, methods in PHASES.items()
        if method in methods
        for knob, schema in knob_schema(phase, method).items()
    }
    former = {
        knob: knobs[present]
        for methods in PHASES.values()
        if method in methods
        for knob, present in methods[method].former_names.items()
    }
    chart = helm_python.Chart.load(CHART)
    for knob, schema in (knobs | former).items():
        chart.validate_schema(one_model(sparse={method: {knob: schema["default"]}}))
        with pytest.raises(helm_python.HelmValuesError):
            chart.validate_schema(one_model(sparse={method: {knob: {"not": "a knob's value"}}}))


def test_values_of_other_charts_are_left_alone() -> None:
    """Helm hands a parent chart's globals to each of its charts."""
    assert render(one_model() | {"global": {"anything": 1}})
