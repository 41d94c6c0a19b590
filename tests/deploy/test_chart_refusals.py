"""Wrong values are refused before anything is installed, with a message that names the setting."""

from __future__ import annotations

import json
from typing import Any

import helm_python
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.helm import generate
from tests.deploy.chart import CHART, find, one_model, refusal, render, server
from tests.vllm_versions import serve_parser
from vllm_sparse.config.names import METHODS, PHASES, knob_schema
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.config.server import parse_server_config


def two_models(**settings: Any) -> dict[str, Any]:
    """Values of a release with models ``a`` and ``b`` of the same settings."""
    return {"models": {name: {"source": {"hub": "org/name"}, **settings} for name in ("a", "b")}}


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
    (one_model(extraArgs=[{"name": "--enforce-eager"}]), "extraArgs"),
    (one_model(env={"1COUNT": 1}), "1COUNT"),
    (one_model(env=[{"value": "1"}]), "env"),
    (one_model(env={"NODE": {"fieldRef": {}}}), "fieldRef"),
    # Quoted numbers have the limits of others.
    (one_model(nodes="0"), "nodes"),
    (one_model(service={"port": "70000"}), "port"),
    (one_model(probes={"startupSeconds": "9"}), "startupSeconds"),
    (one_model(engine={"gpuMemoryUtilization": "1.2"}), "gpuMemoryUtilization"),
    (one_model(replicas="02"), "replicas"),
    (one_model(parallelism={"tensor": -1}), "tensor"),
    (one_model(parallelism={"data": 0}), "data"),
    (one_model(sparse={"tidal": {"budget_tokens": 8}}), "budget_tokens"),
    (one_model(rollout={"maxSurge": "some"}), "maxSurge"),
    (one_model(rollout={"type": "OnDelete"}), "type"),
    (one_model(podDisruptionBudget={"minAvailable": "%"}), "minAvailable"),
    (one_model(podLabels={"team": "a b"}), "team"),
    (one_model(nodeSelector={"zone": "x" * 64}), "zone"),
    (one_model(image={"pullSecrets": [{"secret": "a"}]}), "pullSecrets"),
    (one_model(accelerator={"claims": [{"resourceClaimName": "a"}]}), "claims"),
    (one_model(lora={"maxRank": 20}), "maxRank"),
    (one_model(lora={"adapters": {"sql": ""}}), "sql"),
    (one_model(source={"s3": "https://bucket/model"}), "s3"),
    (one_model(source={"hostPath": "models"}), "hostPath"),
    (one_model(inferencePool={"failureMode": "open"}), "failureMode"),
    ({"router": {"modelHeader": "x model"}}, "modelHeader"),
    ({"serviceAccount": {"annotations": {"role": None}}}, "role"),
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
    (one_model(source={"hub": "org/name", "path": "llama"}), "models.m.source.path"),
    ({"models": {"m": {"source": {"claim": "models", "revision": "v1"}}}}, "models.m.source.revision"),
    ({"models": {"m": {"source": {"s3": "s3://b/m"}, "accelerator": {"count": 0}}}}, "copy the model into a claim"),
    (one_model(cache={"kind": "existingClaim"}), "models.m.cache"),
    (one_model(nodes=2, accelerator={"count": 0}), "models.m.nodes"),
    (one_model(rollout={"maxSurge": 0, "maxUnavailable": 0}), "models.m.rollout"),
    (
        one_model(autoscaling={"kind": "hpa", "minReplicas": 5}),
        "models.m.autoscaling: minReplicas is 5, more than maxReplicas 4; lower it, or raise maxReplicas",
    ),
    (
        one_model(autoscaling={"kind": "hpa", "minReplicas": 0}),
        "models.m.autoscaling: minReplicas is 0, which only kind keda can do; write 1 or more",
    ),
    (one_model(autoscaling={"kind": "keda"}), "models.m.autoscaling"),
    (one_model(ingress={"enabled": True}), "models.m.ingress"),
    (one_model(httpRoute={"enabled": True}), "models.m.httpRoute"),
    # Parallelism.
    (
        one_model(accelerator={"count": 8}, parallelism={"tensor": 4}),
        "write tensor: 8 (or 0, which takes what the others leave)",
    ),
    (one_model(accelerator={"count": 8}, parallelism={"tensor": 8, "data": 8}), "write tensor: 1"),
    (one_model(accelerator={"count": 4}, parallelism={"data": 3}), "write a divisor of 4"),
    (
        one_model(accelerator={"count": 8}, parallelism={"tensor": 4, "pipeline": 4}),
        "tensor 4 x pipeline 4 x data 1 = 16, and accelerator.count 8 x nodes 1 = 8 devices; write tensor: 2",
    ),
    (one_model(accelerator={"count": 8}, parallelism={"pipeline": 3}), "pipeline is 3, which does not divide the 8"),
    (one_model(accelerator={"count": 0}, parallelism={"pipeline": 2}), "pipeline is 2 and data is 1"),
    (one_model(nodes=4, parallelism={"data": 2}), "write data: 1 and raise replicas"),
    (one_model(accelerator={"count": 0}, parallelism={"data": 2}), "raise replicas for more servers"),
    (one_model(accelerator={"count": 0, "claims": [{"name": "gpus"}]}), "models.m.accelerator: claims bring devices"),
    (
        one_model(extraArgs=["--data-parallel-size=8"]),
        "models.m.extraArgs[0]: --data-parallel-size is not allowed; set models.m.parallelism.data instead",
    ),
    (one_model(extraArgs=["--pipeline-parallel-size", 2]), "set models.m.parallelism.pipeline instead"),
    (one_model(extraArgs=["-tp", 2]), "models.m.extraArgs[0]: -tp is a short name"),
    # What the plugin would refuse at its start.
    (one_model(sparse={"decode": "blocktopk"}), "models.m.sparse.decode is blocktopk, which is not enabled; write ["),
    (one_model(sparse={"methods": ["sale"], "prefill": "dhsa"}), "add it to models.m.sparse.methods"),
    (
        one_model(sparse={"methods": ["sale", "tidal"], "preset": "balanced"}),
        "models.m.sparse.preset is balanced, which needs dhsa",
    ),
    (one_model(sparse={"methods": ["sale", "tidal"]}), "models.m.test.extras.sparse_prefill is flexprefill"),
    (one_model(sparse={"tidal": {"budget_tokens": 64, "recent_tokens": 64}}), "write budget_tokens: 80 or more"),
    (
        one_model(sparse={"flexprefill": {"max_budget_tokens": 512}}),
        "models.m.sparse.flexprefill.max_budget_tokens is 512, below min_budget_tokens 1024",
    ),
    (
        one_model(extraArgs=["--kv-cache-dtype=fp8"], accelerator={"count": 0}),
        'models.m.extraArgs[0]: --kv-cache-dtype is "fp8": sparse attention reads no such KV cache there; write one of '
        "auto, float16, bfloat16, or",
    ),
    (
        one_model(extraArgs=["--enforce-eager", "--kv_cache_dtype", "fp8_e5m2"]),
        "write one of auto, float16, bfloat16, fp8, fp8_e4m3, or",
    ),
    (one_model(extraArgs=["--runner", "pooling"]), "write one of auto, generate"),
    (one_model(extraArgs=["--block-size", 8]), "write a multiple of 16"),
    (
        one_model(extraArgs=['--kv-transfer-config={"kv_connector": "NixlConnector"}']),
        "write one of OffloadingConnector",
    ),
    (
        one_model(sparse={"methods": ["flexprefill", "tidal", "blocktopk"]}, extraArgs=["--kv-offloading-size=8"]),
        "drop one of the two",
    ),
    (one_model(env={"VLLM_USE_RUST_FRONTEND": 1}), "models.m.env: VLLM_USE_RUST_FRONTEND is not allowed"),
    (one_model(env=[{"name": "VLLM_BATCH_INVARIANT", "value": "1"}]), "models.m.env: VLLM_BATCH_INVARIANT"),
    # What breaks the probes.
    (one_model(extraArgs=["--ssl-keyfile=/etc/tls/tls.key"]), "end TLS at ingress.tlsSecret"),
    (one_model(extraArgs=["--host", "127.0.0.1"]), "change service.port instead"),
    (one_model(extraArgs=["--model=org/other"]), "set models.m.source instead"),
    # Several models at one door.
    (two_models(ingress={"enabled": True, "host": "a.example.com"}), "models.b.ingress: path /v1/models of host"),
    (two_models(httpRoute={"enabled": True, "parentRefs": [{"name": "g"}]}), "models.b.httpRoute: host"),
    (
        two_models(servedNames=["llama"]) | {"router": {"enabled": True, "parentRefs": [{"name": "g"}]}},
        "models.b.servedNames: the router would find models.a",
    ),
    (one_model() | {"router": {"enabled": True}}, "router.parentRefs is empty"),
    (
        {
            "models": {f"m{n}": {"source": {"hub": "a/b"}} for n in range(17)},
            "router": {"enabled": True, "parentRefs": [{"name": "g"}]},
        },
        "router: 17 models",
    ),
    (one_model(inferencePool={"enabled": True}), "models.m.inferencePool: enabled without an endpointPicker"),
    # Values that people bring.
    (one_model() | {"commonLabels": {"app.kubernetes.io/instance": "x"}}, "commonLabels: app.kubernetes.io/instance"),
    (one_model(podLabels={"app.kubernetes.io/component": "x"}), "models.m.podLabels: app.kubernetes.io/component"),
    (
        one_model(extraVolumeMounts=[{"name": "a", "mountPath": "/tmp/"}]),
        "models.m.extraVolumeMounts[0].mountPath is /tmp",
    ),
    (
        one_model(extraVolumeMounts=[{"name": "a", "mountPath": "/a"}, {"name": "b", "mountPath": "/a"}]),
        "models.m.extraVolumeMounts[1].mountPath is /a",
    ),
    (one_model(sidecars=[{"name": "proxy"}, {"name": "server"}]), "models.m.sidecars[1].name is server"),
    (one_model(initContainers=[{"name": "device"}]), "models.m.initContainers[0].name is device"),
    (one_model(extraVolumes=[{"name": "cache"}]), "models.m.extraVolumes[0].name is cache"),
    (one_model(rollout={"maxSurge": "0%", "maxUnavailable": "0"}), "models.m.rollout"),
    (one_model(rollout={"type": "Recreate"}, nodes=2), "models.m.rollout.type is Recreate"),
    (one_model(service={"loadBalancerClass": "x"}), "models.m.service"),
    (one_model(lora={"adapters": {"m": "org/a"}}), "models.m.lora.adapters.m has a name of the model itself"),
    ({"models": {"m": {"source": {"claim": "c"}, "lora": {"adapters": {"sql": "org/a"}}}}}, "such as /models/sql"),
    (one_model(extraArgs=["enforce-eager"]), "models.m.extraArgs[0] is a value without an argument"),
    (one_model(extraArgs=["--block-size=32", 64]), "models.m.extraArgs[1] is a value without an argument"),
    (one_model(env={"HF_TOKEN": {"valueFrom": {}}}, hubToken={"existingSecret": "t"}), "drop one of the two"),
    # Secrets, and what has a setting of its own.
    (one_model(extraArgs=["--api-key=abc"]), "set models.m.apiKey instead"),
    (one_model(extraArgs=["--api_key", "--abc"]), "set models.m.apiKey instead"),
    (one_model(extraArgs=["--hf-token=abc"]), "set models.m.hubToken instead"),
    (one_model(extraArgs=["--enforce-eager", "--port=1"]), "set models.m.service.port instead"),
    (one_model(extraArgs=["--additional-config={}"]), "set models.m.sparse or additionalConfig instead"),
    (one_model(env={"VLLM_API_KEY": "abc"}), "set models.m.apiKey.existingSecret instead"),
    (one_model(env={"HF_TOKEN": "abc"}), "set models.m.hubToken.existingSecret instead"),
    (one_model(env=[{"name": "HF_TOKEN", "value": "abc"}]), "set models.m.hubToken.existingSecret instead"),
    (one_model(extraArgs=["--api-ke=abc"]), "set models.m.apiKey instead"),
    (
        one_model(extraArgs=["--additional-config.sparse.preset=fast"]),
        "set models.m.sparse or additionalConfig instead",
    ),
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
    arguments = ["--enforce-eager", "--block-size", 32, "--cudagraph-capture-sizes", 1, 2, 4, "--kv-cache-dtype=auto"]
    container = server(one_model(extraArgs=arguments))
    assert container["args"][-len(arguments) :] == [str(argument) for argument in arguments]
    assert "--kv-cache-dtype=fp8" in server(one_model(extraArgs=["--kv-cache-dtype=fp8"]))["args"], "GPUs have FP8"


def test_every_refused_argument_is_refused_with_the_reason() -> None:
    for argument, reason in generate.REFUSED_ARGUMENTS.items():
        message = refusal(one_model(extraArgs=["--enforce-eager", argument]))
        assert f"models.m.extraArgs[1]: {argument} is not allowed: {reason}" in message


def test_refused_arguments_are_vllms_and_no_other_is_taken_for_one() -> None:
    """An argument may be shortened, so one that is allowed must not be the beginning of one that is refused."""
    refused = generate.checks()["arguments"]
    known = [
        [option for option in action.option_strings if option.startswith("--") and not option.startswith("--no-")]
        for action in serve_parser()._actions
    ]
    assert set(refused) <= {option for options in known for option in options}
    for options in known:
        if any(option in refused for option in options):
            assert set(options) <= set(refused), "another name of a refused argument"
        for option in options:
            assert option in refused or not any(name.startswith(option) for name in refused), option


@settings(max_examples=20, deadline=None)
@given(
    method=st.sampled_from(sorted(generate.checks()["budgets"])),
    budget=st.integers(16, 200),
    sink=st.integers(0, 100),
    recent=st.integers(0, 100),
)
def test_budgets_are_refused_as_the_plugin_refuses_them(method: str, budget: int, sink: int, recent: int) -> None:
    knobs = {"budget_tokens": budget, "sink_tokens": sink, "recent_tokens": recent}
    sparse = {method: knobs, "methods": ["flexprefill", "tidal", method]}
    try:
        parse_server_config({"sparse": sparse}, num_layers=32, num_query_heads=32)
    except ValueError:
        assert f"models.m.sparse.{method}.budget_tokens is {budget}" in refusal(one_model(sparse=sparse))
    else:
        assert render(one_model(sparse=sparse))


@settings(max_examples=25, deadline=None)
@given(
    methods=st.none() | st.sets(st.sampled_from(METHODS)),
    preset=st.sampled_from(["dense", *PRESETS]),
    prefill=st.sampled_from([None, "dense", *PHASES["prefill"]]),
    decode=st.sampled_from([None, "dense", *PHASES["decode"]]),
)
def test_methods_are_refused_as_the_plugin_refuses_them(
    methods: set[str] | None, preset: str, prefill: str | None, decode: str | None
) -> None:
    named = {
        "preset": preset,
        "prefill": prefill,
        "decode": decode,
        "methods": None if methods is None else sorted(methods),
    }
    sparse = {name: value for name, value in named.items() if value is not None}
    values = one_model(sparse=sparse, test={"extras": {"sparse_prefill": "dense", "sparse_decode": "dense"}})
    try:
        parse_server_config({"sparse": sparse}, num_layers=32, num_query_heads=32)
    except ValueError:
        assert "models.m.sparse." in refusal(values)
    else:
        assert render(values)


def test_sixteen_models_may_share_a_door() -> None:
    models = {f"m{number}": {"source": {"hub": "org/name"}} for number in range(16)}
    assert find(render({"models": models, "router": {"enabled": True, "parentRefs": [{"name": "g"}]}}), "HTTPRoute")


def test_two_models_may_have_doors_of_their_own() -> None:
    values = two_models()
    for name, model in values["models"].items():
        model["httpRoute"] = {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": [f"{name}.example.com"]}
        model["ingress"] = {"enabled": True, "host": f"{name}.example.com"}
    assert len([each for each in render(values) if each["kind"] in ("HTTPRoute", "Ingress")]) == 4


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
