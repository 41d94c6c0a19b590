"""Write what follows from the chart's values.yaml and templates and from the plugin's own settings.

* ``values.schema.json``: types from the defaults in values.yaml, limits from `LIMITS` below, the object ``sparse`` from
  the plugin's configuration and the knobs of its methods. Closed: an unknown key is an error.
* ``files/checks.json``: what the templates refuse because the plugin would, by its registry, and which arguments of
  vLLM have a setting of the chart.
* ``README.md``: a table of the settings, with the comments of values.yaml.
* ``rendered/EXAMPLE.yaml``: what Helm renders for each example, so that a change of the templates shows in review.

Usage: python deploy/helm/generate.py    (in the environment of `make setup`)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import helm_python
import yaml
from pydantic import ValidationError
from vllm.config.lora import MaxLoRARanks

from vllm_sparse.backend.cuda import GpuDeclarations
from vllm_sparse.backend.support import SALTED_CONNECTORS, SparseDeclarations
from vllm_sparse.config.limits import Limits
from vllm_sparse.config.names import METHODS, PHASES, knob_schema
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.knobs import KnobError
from vllm_sparse.methods.registry import DEFAULT_METHODS, SUMMARISING_METHODS

CHART = Path(__file__).parent / "vllm-sparse"
EXAMPLES = CHART / "examples"
CHECKS = CHART / "files" / "checks.json"
RENDERED = Path(__file__).parent / "rendered"
SCENARIOS = Path(__file__).parents[2] / "loadtest" / "load" / "scenarios"
RELEASE, NAMESPACE = "example", "llm"

Schema = dict[str, Any]

ANYTHING: Schema = {}
TEXT_MAP: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
# Kubernetes wants texts; the templates make numbers and booleans such.
TEXT: Schema = {"type": ["string", "number", "boolean"]}
ANNOTATIONS: Schema = {"type": "object", "additionalProperties": TEXT}
LABELS: Schema = {
    "type": "object",
    "additionalProperties": {**TEXT, "pattern": "^([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?$", "maxLength": 63},
}
ENVIRONMENT_VALUE: Schema = {
    "properties": {"value": TEXT, "valueFrom": {"type": "object"}},
    "minProperties": 1,
}
NAMES_OR_OBJECTS: Schema = {"type": "array", "items": {"type": ["string", "object"], "required": ["name"]}}
OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
SIZE: Schema = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$"}
COUNT: Schema = {"minimum": 0}
POSITIVE: Schema = {"minimum": 1}
SHARE: Schema = {"minimum": 0, "maximum": 1, "pattern": "^(0?[.][0-9]+|[01]([.]0+)?)$"}
NUMBER_OR_SHARE: Schema = {"type": ["integer", "string"], "minimum": 0, "pattern": "^(0|[1-9][0-9]*)%?$"}
PORT: Schema = {
    "minimum": 1,
    "maximum": 65535,
    "pattern": "^([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$",
}
DURATION: Schema = {"pattern": "^([0-9]+(h|m|s|ms))*$"}
CREATE: Schema = {"enum": ["auto", "always", "never"]}
RESOURCES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        name: {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
        for name in ("requests", "limits")
    },
}

# What a setting's default does not tell of it; `*` stands for any model's settings.
LIMITS: dict[str, Schema] = {
    "commonLabels": LABELS,
    "commonAnnotations": ANNOTATIONS,
    "imagePullSecrets": NAMES_OR_OBJECTS,
    "serviceAccount.annotations": ANNOTATIONS,
    "router.parentRefs": OBJECTS,
    "router.hostnames": {"items": {"type": "string"}},
    "router.modelHeader": {"pattern": "^[A-Za-z0-9-]+$"},
    "router.timeout": DURATION,
    "*.image.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "*.image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "*.source.hub": {"pattern": "^([A-Za-z0-9._-]+/)?[A-Za-z0-9._-]*$"},
    "*.image.pullSecrets": NAMES_OR_OBJECTS,
    "*.source.hostPath": {"pattern": "^(/.+)?$"},
    "*.source.s3": {"pattern": "^(s3://.+)?$"},
    "*.source.path": {"pattern": "^([^/].*)?$"},
    "*.servedNames": {"items": {"type": "string", "minLength": 1}},
    "*.accelerator.resource": {"pattern": "^[a-z0-9.-]+/[A-Za-z0-9._-]+$"},
    "*.accelerator.count": COUNT,
    "*.accelerator.claims": {"items": {"type": "object", "required": ["name"]}},
    "*.nodes": POSITIVE,
    "*.parallelism.tensor": COUNT,
    "*.parallelism.pipeline": POSITIVE,
    "*.parallelism.data": POSITIVE,
    "*.engine.maxModelLen": COUNT,
    "*.engine.gpuMemoryUtilization": {
        "exclusiveMinimum": 0,
        "maximum": 1,
        "pattern": "^(0?[.][0-9]*[1-9][0-9]*|1([.]0+)?)$",
    },
    "*.engine.cpuKvCacheGiB": POSITIVE,
    "*.engine.maxNumBatchedTokens": COUNT,
    "*.engine.maxNumSeqs": COUNT,
    "*.engine.dtype": {"enum": ["auto", "half", "float16", "bfloat16", "float", "float32"]},
    "*.additionalConfig": {"type": "object", "properties": {"sparse": False}},
    "*.lora.adapters": {"type": "object", "additionalProperties": {"type": "string", "minLength": 1}},
    "*.lora.maxAdapters": COUNT,
    "*.lora.maxRank": {"enum": [*get_args(MaxLoRARanks), *map(str, get_args(MaxLoRARanks))]},
    "*.extraArgs": {"items": TEXT},
    "*.env": {
        "type": ["object", "array"],
        "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
        "additionalProperties": {
            "type": [*TEXT["type"], "null", "object"],
            "additionalProperties": False,
            **ENVIRONMENT_VALUE,
        },
        "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {"name": {"type": "string"}, **ENVIRONMENT_VALUE["properties"]},
        },
    },
    "*.envFrom": OBJECTS,
    "*.files": {**TEXT_MAP, "propertyNames": {"pattern": "^[A-Za-z0-9._-]+$"}},
    "*.cache.kind": {"enum": ["emptyDir", "newClaim", "existingClaim"]},
    "*.cache.size": SIZE,
    "*.cache.accessModes": {
        "minItems": 1,
        "items": {"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]},
    },
    "*.sharedMemory": SIZE,
    "*.temporarySpace": SIZE,
    "*.resources": RESOURCES,
    "*.replicas": COUNT,
    "*.autoscaling.kind": {"enum": ["none", "hpa", "keda"]},
    "*.autoscaling.minReplicas": COUNT,
    "*.autoscaling.maxReplicas": POSITIVE,
    "*.autoscaling.waitingTokens": COUNT,
    "*.autoscaling.waitingRequests": COUNT,
    "*.autoscaling.kvCacheUsage": SHARE,
    "*.autoscaling.timeToFirstTokenSeconds": {"minimum": 0, "pattern": "^[0-9]+([.][0-9]+)?$"},
    "*.autoscaling.hpaMetrics": OBJECTS,
    "*.autoscaling.authentication.modes": {"pattern": "^((bearer|basic|tls|custom)(,(bearer|basic|tls|custom))*)?$"},
    "*.autoscaling.authentication.kind": {"enum": ["TriggerAuthentication", "ClusterTriggerAuthentication"]},
    "*.autoscaling.authentication.secretTargetRef": {
        "type": "array",
        "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["parameter", "name", "key"],
            "properties": {key: {"type": "string", "minLength": 1} for key in ("parameter", "name", "key")},
        },
    },
    "*.autoscaling.triggerMetadata": TEXT_MAP,
    "*.autoscaling.prometheus": {"pattern": "^(https?://.+)?$"},
    "*.autoscaling.scaleDownSeconds": {
        "minimum": 0,
        "maximum": 3600,
        "pattern": "^(0|[1-9][0-9]{0,2}|[12][0-9]{3}|3[0-5][0-9]{2}|3600)$",
    },
    "*.autoscaling.fallbackReplicas": COUNT,
    "*.rollout.type": {"enum": ["RollingUpdate", "Recreate"]},
    "*.rollout.maxSurge": NUMBER_OR_SHARE,
    "*.rollout.maxUnavailable": NUMBER_OR_SHARE,
    "*.podDisruptionBudget.maxUnavailable": NUMBER_OR_SHARE,
    "*.podDisruptionBudget.minAvailable": {**NUMBER_OR_SHARE, "pattern": "^((0|[1-9][0-9]*)%?)?$"},
    "*.probes.startupSeconds": {"minimum": 10},
    "*.probes.livenessSeconds": {"minimum": 10},
    "*.drain.endpointSeconds": COUNT,
    "*.drain.requestSeconds": POSITIVE,
    "*.drain.teardownSeconds": POSITIVE,
    "*.service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "*.service.loadBalancerSourceRanges": {"items": {"type": "string"}},
    "*.service.port": PORT,
    "*.service.annotations": ANNOTATIONS,
    "*.ingress.paths": {"minItems": 1, "items": {"type": "string", "pattern": "^/"}},
    "*.ingress.annotations": ANNOTATIONS,
    "*.httpRoute.parentRefs": OBJECTS,
    "*.httpRoute.hostnames": {"items": {"type": "string"}},
    "*.httpRoute.timeout": DURATION,
    "*.inferencePool.port": PORT,
    "*.inferencePool.failureMode": {"enum": ["FailOpen", "FailClose"]},
    "*.podSecurityContext": {"type": "object"},
    "*.securityContext": {"type": "object"},
    "*.podLabels": LABELS,
    "*.podAnnotations": ANNOTATIONS,
    "*.nodeSelector": LABELS,
    "*.tolerations": OBJECTS,
    "*.affinity": {"type": "object"},
    "*.topologySpreadConstraints": OBJECTS,
    "*.extraVolumes": OBJECTS,
    "*.extraVolumeMounts": OBJECTS,
    "*.initContainers": OBJECTS,
    "*.sidecars": OBJECTS,
    "*.tracing.ratio": SHARE,
    "*.test.extras": {"type": "object"},
    "*.test.promptWords": POSITIVE,
    "*.test.timeoutSeconds": POSITIVE,
    "*.loadTest.run": {"pattern": "^([a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?)?$"},
    "*.loadTest.scenario": {"enum": sorted(path.stem for path in SCENARIOS.glob("*.yaml"))},
    "*.loadTest.set": {"items": {"type": "string", "pattern": "^[^=]+="}},
    "*.loadTest.deadlineSeconds": POSITIVE,
    "*.loadTest.results.size": SIZE,
    "*.loadTest.resources": RESOURCES,
    "monitoring.monitor.create": CREATE,
    "monitoring.monitor.kind": {"enum": ["PodMonitor", "ServiceMonitor"]},
    "monitoring.monitor.interval": {"pattern": "^[0-9]+(ms|s|m|h)$"},
    "monitoring.monitor.scrapeTimeout": {"pattern": "^[0-9]+(ms|s|m|h)$"},
    "monitoring.monitor.labels": LABELS,
    "monitoring.monitor.relabelings": OBJECTS,
    "monitoring.monitor.metricRelabelings": OBJECTS,
    "monitoring.rules.create": CREATE,
    "monitoring.rules.labels": LABELS,
    "monitoring.rules.runbookBase": {"pattern": "^(https?://.+/)?$"},
    "monitoring.dashboard.labels": LABELS,
    "monitoring.dashboard.annotations": ANNOTATIONS,
    "networkPolicy.from": OBJECTS,
    "networkPolicy.egress.extra": OBJECTS,
    "extraObjects": OBJECTS,
}
# Arguments of vllm serve that have a setting of their own: whoever may list pods can read an argument, and a second one
# would quarrel with what else follows from the setting.
SETTINGS_OF_ARGUMENTS = {
    "--additional-config": "sparse or additionalConfig",
    "--api-key": "apiKey",
    "--data-parallel-address": "nodes",
    "--data-parallel-backend": "parallelism.data",
    "--data-parallel-external-lb": "parallelism.data",
    "--data-parallel-hybrid-lb": "parallelism.data",
    "--data-parallel-multi-port-external-lb": "parallelism.data",
    "--data-parallel-rank": "parallelism.data",
    "--data-parallel-rpc-port": "parallelism.data",
    "--data-parallel-size": "parallelism.data",
    "--data-parallel-size-local": "parallelism.data",
    "--data-parallel-start-rank": "parallelism.data",
    "--device-memory-utilization": "engine.gpuMemoryUtilization",
    "--dtype": "engine.dtype",
    "--enable-lora": "lora.adapters",
    "--gpu-memory-utilization": "engine.gpuMemoryUtilization",
    "--headless": "nodes",
    "--hf-token": "hubToken",
    "--lora-modules": "lora.adapters",
    "--master-addr": "nodes",
    "--master-port": "nodes",
    "--max-lora-rank": "lora.maxRank",
    "--max-loras": "lora.maxAdapters",
    "--max-model-len": "engine.maxModelLen",
    "--max-num-batched-tokens": "engine.maxNumBatchedTokens",
    "--max-num-seqs": "engine.maxNumSeqs",
    "--model": "source",
    "--nnodes": "nodes",
    "--node-rank": "nodes",
    "--otlp-traces-endpoint": "tracing.endpoint",
    "--pipeline-parallel-size": "parallelism.pipeline",
    "--port": "service.port",
    "--revision": "source.revision",
    "--served-model-name": "servedNames",
    "--shutdown-timeout": "drain.requestSeconds",
    "--tensor-parallel-size": "parallelism.tensor",
}
_HTTP = "probes, tests and the service speak HTTP; end TLS at ingress.tlsSecret, at the gateway or in the mesh instead"
_REACH = "probes and the service reach the server on all addresses of its pod, port 8000; change service.port instead"
_CONTEXT = "sparse attention does not support context parallelism; raise parallelism.tensor instead"
_POOLING = "sparse attention is of generations and does not support pooling models; leave it out"
# Other arguments with which the plugin, or what the chart promises, could not work: the reason, and what to do instead.
REFUSED_ARGUMENTS = {
    "--attention-backend": "the backend is sparse; requests without sparse settings run dense, so leave it out",
    "--attention-config": "the backend is sparse, which takes the FlashAttention that vLLM chooses; leave it out",
    "--config": "a file may set what the chart sets too; write its arguments here, one by one, instead",
    "--convert": _POOLING,
    "--decode-context-parallel-size": _CONTEXT,
    "--enable-dbo": "sparse attention does not support dual-batch overlap; leave it out",
    "--enable-ssl-refresh": _HTTP,
    "--grpc": "probes and tests speak HTTP; leave it out",
    "--grpc-port": "probes and tests speak HTTP; leave it out",
    "--host": _REACH,
    "--pooler-config": _POOLING,
    "--prefill-context-parallel-size": _CONTEXT,
    "--ssl-ca-certs": _HTTP,
    "--ssl-cert-reqs": _HTTP,
    "--ssl-certfile": _HTTP,
    "--ssl-ciphers": _HTTP,
    "--ssl-keyfile": _HTTP,
    "--uds": _REACH,
}
_UNSET = ["", "0", "false", "False"]
# Environment variables likewise, unless they have one of these values.
REFUSED_ENVIRONMENT = {
    "VLLM_BATCH_INVARIANT": "sparse attention does not support batch-invariant kernels; leave it out",
    "VLLM_USE_RUST_FRONTEND": "sparse attention checks requests in vLLM's Python frontend; leave it out",
}
TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}


def without_titles(schema: Any) -> Any:
    """A JSON schema without the titles that pydantic makes of the names."""
    if isinstance(schema, dict):
        return {
            key: without_titles(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)
        }
    return [without_titles(entry) for entry in schema] if isinstance(schema, list) else schema


def former_knob(knob: Schema, name: str) -> Schema:
    """Schema of a knob under its former name; without a default, which the present name has."""
    constraints = {key: value for key, value in without_titles(knob).items() if key != "default"}
    return {**constraints, "description": f"former name of {name}, accepted for one release", "deprecated": True}


def sparse_schema() -> Schema:
    """Schema of the plugin's configuration, the methods' knobs included."""
    schema = without_titles(ServerConfig.model_json_schema())
    properties = schema["properties"]
    properties["methods"]["items"] = {"enum": list(METHODS)}
    properties["preset"]["enum"] = ["dense", *PRESETS]
    for phase, methods in PHASES.items():
        properties[phase] = {"enum": ["dense", *methods, None], "default": None}
    limits = without_titles(Limits.model_json_schema())
    properties["limits"] = {key: value for key, value in limits.items() if key != "description"}
    for method in METHODS:
        phases = [phase for phase, methods in PHASES.items() if method in methods]
        # Limits are of requests, not of the server's own knobs.
        knobs = {
            knob: {key: value for key, value in schema.items() if key not in ("limit", "compiles")}
            for phase in phases
            for knob, schema in knob_schema(phase, method).items()
        }
        former = {knob: name for phase in phases for knob, name in PHASES[phase][method].former_names.items()}
        properties[method] = {
            "type": "object",
            "additionalProperties": False,
            "properties": without_titles(knobs)
            | {knob: former_knob(knobs[name], name) for knob, name in former.items()},
        }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def schema_of(default: Any, path: str) -> Schema:
    """Schema of a setting with this default: a map is closed unless `LIMITS` names it."""
    limits = LIMITS.get(path, {})
    if "type" in limits or path == "*.sparse":
        return {"$ref": "#/definitions/sparse"} if path == "*.sparse" else limits
    if isinstance(default, dict):
        properties = {name: schema_of(value, f"{path}.{name}".lstrip(".")) for name, value in default.items()}
        return {"type": "object", "additionalProperties": False, "properties": properties}
    if type(default) in (int, float):
        return limits if "enum" in limits else quotable(TYPE_NAMES[type(default)], limits)
    return {"type": TYPE_NAMES[type(default)], **limits}


def quotable(type_name: str, limits: Schema) -> Schema:
    """Schema of a number that may come as a text, as `--set-string` and other tools give it."""
    least = str(limits.get("minimum", 0))
    whole = "(0|[1-9][0-9]*)" if least == "0" else f"[1-9][0-9]{{{len(least) - 1},}}"
    decimals = "([.][0-9]+)?" if type_name == "number" else ""
    return {"type": [type_name, "string"], "pattern": f"^{whole}{decimals}$", **limits}


def checks() -> dict[str, Any]:
    """What the templates refuse because the plugin would, and arguments that have a setting."""
    budgets, ordered = {}, {}
    for phase, methods in PHASES.items():
        for name, method in methods.items():
            defaults = {knob: schema["default"] for knob, schema in knob_schema(phase, name).items()}
            if _refuses_small_budgets(method):
                budgets[name] = {knob: defaults[knob] for knob in ("budget_tokens", "sink_tokens", "recent_tokens")}
            pairs = [
                {"least": {"knob": knob, "default": value}, "most": {"knob": most, "default": defaults[most]}}
                for knob, value in defaults.items()
                if knob.startswith("min_") and (most := knob.replace("min_", "max_", 1)) in defaults
            ]
            if pairs:
                ordered[name] = pairs
    return {
        "enabled": DEFAULT_METHODS,
        "summarising": SUMMARISING_METHODS,
        "presets": {name: {phase: preset.methods(phase) for phase in PHASES} for name, preset in PRESETS.items()},
        "budgets": budgets,
        "ordered": ordered,
        "arguments": {name: {"setting": setting} for name, setting in SETTINGS_OF_ARGUMENTS.items()}
        | {name: {"reason": reason} for name, reason in REFUSED_ARGUMENTS.items()},
        "values": {
            "--kv-cache-dtype": {
                "gpu": GpuDeclarations.supported_kv_cache_dtypes,
                "cpu": SparseDeclarations.supported_kv_cache_dtypes,
                "reason": "sparse attention reads no such KV cache there",
            },
            "--runner": {
                "gpu": ["auto", "generate"],
                "cpu": ["auto", "generate"],
                "reason": "sparse attention is of generations",
            },
        },
        "connectors": SALTED_CONNECTORS,
        "environment": {name: {"allowed": _UNSET, "reason": reason} for name, reason in REFUSED_ENVIRONMENT.items()},
    }


def _refuses_small_budgets(method: Any) -> bool:
    """Whether a method wants a budget that holds its first and last tokens."""
    try:
        method(budget_tokens=16, sink_tokens=16, recent_tokens=16)
    except ValidationError as error:
        # Otherwise it has not all of these knobs.
        reason = error.errors()[0].get("ctx", {}).get("error")
        return isinstance(reason, KnobError) and reason.knob == "budget_tokens"
    return False


def values_schema() -> Schema:
    """The whole of values.schema.json. Draft 7, which every Helm that the chart supports understands."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    defaults = values.pop("modelDefaults")
    del values["models"]
    schema = schema_of(values, "")
    model = schema_of(defaults, "*")
    schema["properties"] |= {
        "modelDefaults": {"$ref": "#/definitions/model"},
        "models": {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$"},
            "additionalProperties": {"$ref": "#/definitions/model"},
        },
        # Helm gives a parent chart's globals to all of its charts.
        "global": {"type": "object"},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **schema,
        "definitions": {"model": model, "sparse": sparse_schema()},
    }


def described_settings() -> Iterator[tuple[str, str]]:
    """Path and description of each setting in values.yaml that has a ``# --`` comment."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("# -- "):
            comment = [text.removeprefix("# -- ")]
        elif text.startswith("# ") and comment:
            comment.append(text.removeprefix("# "))
        elif found := re.match(r"( *)([A-Za-z][A-Za-z0-9_]*):", line):
            indent = len(found[1])
            path = [(depth, name) for depth, name in path if depth < indent] + [(indent, found[2])]
            if comment:
                yield ".".join(name for _, name in path), " ".join(comment)
            comment = []
        else:
            comment = []


def table_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default_text(values: Any, path: str) -> str:
    for name in path.split("."):
        values = values[name]
    return f"`{json.dumps(values)}`"


def allowed_text(schema: Schema) -> str:
    """Type and limits of a sparse setting in short."""
    schema = {**schema, **next(iter(schema.get("anyOf", ())), {})}
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    bounds = [
        f"{word} {schema[key]}"
        for key, word in (("exclusiveMinimum", "above"), ("minimum", "from"), ("maximum", "to"))
        if key in schema
    ]
    return " ".join([schema.get("type", ""), *bounds])


def readme() -> str:
    """README.md of the chart."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    rows = [table_row(f"`{path}`", default_text(values, path), text) for path, text in described_settings()]
    knobs = []
    for name, schema in sparse_schema()["properties"].items():
        for knob, entry in schema.get("properties", {"": schema}).items():
            if entry.get("deprecated"):
                continue
            default = f"`{json.dumps(entry['default'])}`" if "default" in entry else ""
            key = f"`{name}.{knob}`" if knob else f"`{name}`"
            knobs.append(table_row(key, default, allowed_text(entry), entry.get("description", "")))
    metadata = yaml.safe_load((CHART / "Chart.yaml").read_text())
    return "\n".join(
        [
            f"# Chart {metadata['name']}",
            "",
            f"{metadata['description']}. How to use it, size it and upgrade it: `deploy/README.md` of the project. "
            "This page is made by `python deploy/helm/generate.py`; change values.yaml instead.",
            "",
            f"Needs Kubernetes {metadata['kubeVersion'].removesuffix('-0').removeprefix('>=')} or newer.",
            "",
            "    helm install llm deploy/helm/vllm-sparse --values deploy/helm/vllm-sparse/examples/one-gpu.yaml",
            "",
            "## Settings",
            "",
            "A model's entry under `models` takes everything that `modelDefaults` has, with the same names.",
            "",
            table_row("setting", "default", "meaning"),
            "|---|---|---|",
            *rows,
            "",
            "## Settings of `sparse`",
            "",
            "What is left out takes the plugin's default; the project's README explains methods and knobs.",
            "",
            table_row("setting", "plugin's default", "allowed", "meaning"),
            "|---|---|---|---|",
            *knobs,
            "",
        ]
    )


def render(values: dict[str, Any]) -> str:
    """All objects that Helm renders for values, in the templates' order; hooks too."""
    rendered = helm_python.Chart.load(CHART).render(values, name=RELEASE, namespace=NAMESPACE)
    parts = [text.strip().removeprefix("---\n") for name, text in sorted(rendered.items()) if name.endswith(".yaml")]
    return "".join(f"---\n{part}\n" for part in parts if part)


def recorded(manifest: str) -> str:
    """A render without what has a file and checks of its own: the dashboard, the rules and the scripts."""
    documents = []
    for document in yaml.safe_load_all(manifest):
        if document["kind"] == "PrometheusRule":
            document["spec"] = "files/rules.yaml"
        if document["kind"] == "ConfigMap" and document["metadata"]["name"].endswith(("-dashboard", "-scripts")):
            document["data"] = {name: f"files/{name}" for name in document["data"]}
        documents.append(document)
    text: str = yaml.safe_dump_all(documents, sort_keys=False, width=120)
    return text


def generated() -> dict[Path, str]:
    """Every generated file and its content."""
    files = {
        CHART / "values.schema.json": json.dumps(values_schema(), indent=2) + "\n",
        CHECKS: json.dumps(checks(), indent=2) + "\n",
        CHART / "README.md": readme(),
    }
    for example in sorted(EXAMPLES.glob("*.yaml")):
        files[RENDERED / example.name] = recorded(render(yaml.safe_load(example.read_text())))
    return files


def main() -> int:
    # The checks first: Helm renders the examples by them.
    schema = CHART / "values.schema.json"
    schema.write_text(json.dumps(values_schema(), indent=2) + "\n")
    CHECKS.write_text(json.dumps(checks(), indent=2) + "\n")
    RENDERED.mkdir(exist_ok=True)
    for path, content in generated().items():
        path.write_text(content)
        print(path.relative_to(Path(__file__).parents[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
