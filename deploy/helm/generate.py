"""Write what follows from the chart's values.yaml and templates and from the plugin's own settings.

* ``values.schema.json``: types from the defaults in values.yaml, limits from `LIMITS` below, the object ``sparse`` from
  the plugin's configuration and the knobs of its methods. Closed: an unknown key is an error.
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
from typing import Any

import helm_python
import yaml

from vllm_sparse.config.limits import Limits
from vllm_sparse.config.names import METHODS, PHASES, knob_schema
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.config.settings import ServerConfig

CHART = Path(__file__).parent / "vllm-sparse"
EXAMPLES = CHART / "examples"
RENDERED = Path(__file__).parent / "rendered"
SCENARIOS = Path(__file__).parents[2] / "loadtest" / "load" / "scenarios"
RELEASE, NAMESPACE = "example", "llm"

Schema = dict[str, Any]

ANYTHING: Schema = {}
TEXT_MAP: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
SIZE: Schema = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$"}
COUNT: Schema = {"minimum": 0}
POSITIVE: Schema = {"minimum": 1}
SHARE: Schema = {"minimum": 0, "maximum": 1}
CREATE: Schema = {"enum": ["auto", "always", "never"]}
RESOURCES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        name: {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
        for name in ("requests", "limits")
    },
}

# What a setting's default does not tell of it; `*` stands for any model's settings.
LIMITS: dict[str, Schema] = {
    "commonLabels": TEXT_MAP,
    "commonAnnotations": TEXT_MAP,
    "imagePullSecrets": OBJECTS,
    "*.image.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "*.image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "*.source.hub": {"pattern": "^([A-Za-z0-9._-]+/)?[A-Za-z0-9._-]*$"},
    "*.source.path": {"pattern": "^([^/].*)?$"},
    "*.servedNames": {"items": {"type": "string", "minLength": 1}},
    "*.accelerator.resource": {"pattern": "^[a-z0-9.-]+/[A-Za-z0-9._-]+$"},
    "*.accelerator.count": COUNT,
    "*.nodes": POSITIVE,
    "*.engine.maxModelLen": COUNT,
    "*.engine.gpuMemoryUtilization": {"exclusiveMinimum": 0, "maximum": 1},
    "*.engine.cpuKvCacheGiB": POSITIVE,
    "*.engine.maxNumBatchedTokens": COUNT,
    "*.engine.maxNumSeqs": COUNT,
    "*.engine.dtype": {"enum": ["auto", "half", "float16", "bfloat16", "float", "float32"]},
    "*.additionalConfig": {"type": "object", "properties": {"sparse": False}},
    "*.extraArgs": {"items": {"type": "string", "pattern": "^--[a-z]"}},
    "*.env": {
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
        "additionalProperties": {"type": ["string", "null"]},
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
    "*.autoscaling.scaleDownSeconds": {"minimum": 0, "maximum": 3600},
    "*.autoscaling.fallbackReplicas": COUNT,
    "*.rollout.maxSurge": COUNT,
    "*.rollout.maxUnavailable": COUNT,
    "*.podDisruptionBudget.maxUnavailable": COUNT,
    "*.probes.startupSeconds": {"minimum": 10},
    "*.probes.livenessSeconds": {"minimum": 10},
    "*.drain.endpointSeconds": COUNT,
    "*.drain.requestSeconds": POSITIVE,
    "*.drain.teardownSeconds": POSITIVE,
    "*.service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "*.service.port": {"minimum": 1, "maximum": 65535},
    "*.service.annotations": TEXT_MAP,
    "*.ingress.paths": {"minItems": 1, "items": {"type": "string", "pattern": "^/"}},
    "*.ingress.annotations": TEXT_MAP,
    "*.httpRoute.parentRefs": OBJECTS,
    "*.httpRoute.hostnames": {"items": {"type": "string"}},
    "*.httpRoute.timeout": {"pattern": "^([0-9]+(h|m|s|ms))*$"},
    "*.podSecurityContext": {"type": "object"},
    "*.securityContext": {"type": "object"},
    "*.podLabels": TEXT_MAP,
    "*.podAnnotations": TEXT_MAP,
    "*.nodeSelector": TEXT_MAP,
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
    "monitoring.monitor.labels": TEXT_MAP,
    "monitoring.monitor.relabelings": OBJECTS,
    "monitoring.monitor.metricRelabelings": OBJECTS,
    "monitoring.rules.create": CREATE,
    "monitoring.rules.labels": TEXT_MAP,
    "monitoring.rules.runbookBase": {"pattern": "^(https?://.+/)?$"},
    "monitoring.dashboard.labels": TEXT_MAP,
    "monitoring.dashboard.annotations": TEXT_MAP,
    "networkPolicy.from": OBJECTS,
    "networkPolicy.egress.extra": OBJECTS,
    "extraObjects": OBJECTS,
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
    return {"type": TYPE_NAMES[type(default)], **limits}


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
        CHART / "README.md": readme(),
    }
    for example in sorted(EXAMPLES.glob("*.yaml")):
        files[RENDERED / example.name] = recorded(render(yaml.safe_load(example.read_text())))
    return files


def main() -> int:
    # The schema first: Helm checks the examples against it.
    schema = CHART / "values.schema.json"
    schema.write_text(json.dumps(values_schema(), indent=2) + "\n")
    RENDERED.mkdir(exist_ok=True)
    for path, content in generated().items():
        path.write_text(content)
        print(path.relative_to(Path(__file__).parents[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
