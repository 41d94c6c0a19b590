"""Values as people bring them, parallelism, and one door for several models."""

from __future__ import annotations

import copy
import importlib.util
import socket
import subprocess
import sys
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.chart import CHART, Manifest, example, find, manifest_text, one_model, pod_spec, render, server
from vllm_sparse.backend.executors.rule import Device, stock_kernels
from vllm_sparse.server.preset_header import PresetHeader

# Settings whose values the chart hands on as they are.
FREE_FORM = ("env", "resources", "sparse", "test", "podSecurityContext")


def from_source(**source: str) -> dict[str, Any]:
    """Values of a release with one model from a source."""
    return {"models": {"m": {"source": source}}}


def environment(values: dict[str, Any]) -> dict[str, Any]:
    """Variables of the server and what they are, `value` or `valueFrom`."""
    entries = server(values)["env"]
    found = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}
    assert len(found) == len(entries), "a name twice"
    return found


class TestParallelism:
    @pytest.mark.parametrize(
        ("settings", "tensor", "pipeline", "data"),
        [
            ({}, 1, 1, 1),
            ({"accelerator": {"count": 8}}, 8, 1, 1),
            ({"accelerator": {"count": 8}, "parallelism": {"tensor": 8}}, 8, 1, 1),
            ({"accelerator": {"count": 8}, "parallelism": {"data": 8}}, 1, 1, 8),
            ({"accelerator": {"count": 8}, "parallelism": {"tensor": 4, "data": 2}}, 4, 1, 2),
            ({"accelerator": {"count": 8}, "parallelism": {"pipeline": 2, "data": 2}}, 2, 2, 2),
            ({"accelerator": {"count": 8}, "nodes": 2}, 16, 1, 1),
            ({"accelerator": {"count": 8}, "nodes": 2, "parallelism": {"pipeline": 2}}, 8, 2, 1),
            ({"accelerator": {"count": 8}, "nodes": 2, "parallelism": {"data": 16}}, 1, 1, 16),
            ({"accelerator": {"count": 8}, "nodes": 2, "parallelism": {"data": 4}}, 4, 1, 4),
            ({"accelerator": {"count": "8"}, "nodes": "2", "parallelism": {"tensor": "8", "data": "2"}}, 8, 1, 2),
        ],
    )
    def test_covers_all_devices(self, settings: dict[str, Any], tensor: int, pipeline: int, data: int) -> None:
        manifests = render(one_model(**settings))
        (scaled,) = [each for each in manifests if each["kind"] in ("Deployment", "LeaderWorkerSet")]
        group = scaled["spec"].get("leaderWorkerTemplate", {})
        for template in (scaled["spec"].get("template"), group.get("leaderTemplate"), group.get("workerTemplate")):
            if template is None:
                continue
            arguments = template["spec"]["containers"][0]["args"]
            assert f"--tensor-parallel-size={tensor}" in arguments
            for kind, size in (("pipeline", pipeline), ("data", data)):
                told = [each for each in arguments if f"{kind}-parallel" in each]
                assert told == [f"--{kind}-parallel-size={size}"] * (size > 1)

    def test_nodes_of_data_parallelism_know_their_place(self) -> None:
        """From its rank and the leader's address vLLM infers how many copies a node has, and which."""
        group = find(render(one_model(nodes=2, parallelism={"data": 2})), "LeaderWorkerSet")["spec"]
        leader, worker = (
            group["leaderWorkerTemplate"][name]["spec"]["containers"][0]["args"]
            for name in ("leaderTemplate", "workerTemplate")
        )
        place = {"--nnodes=2", "--node-rank=$(LWS_WORKER_INDEX)", "--master-addr=$(LWS_LEADER_ADDRESS)"}
        assert place <= set(leader)
        assert set(worker) == {*leader, "--headless"}

    def test_has_no_place_on_a_cpu(self) -> None:
        assert not any("parallel" in argument for argument in server(one_model(accelerator={"count": 0}))["args"])


class TestNumbers:
    def test_may_be_quoted(self) -> None:
        """All of them at once; nothing that is rendered changes."""
        defaults = yaml.safe_load((CHART / "values.yaml").read_text())["modelDefaults"]
        settings = {
            **{name: value for name, value in defaults.items() if name not in FREE_FORM},
            "source": {"hub": "org/name"},
            "autoscaling": {**defaults["autoscaling"], "kind": "keda", "prometheus": "http://p:9090"},
            "tracing": {"endpoint": "http://collector:4317", "ratio": 0.25},
            "loadTest": {**defaults["loadTest"], "run": "first"},
            "inferencePool": {**defaults["inferencePool"], "enabled": True, "endpointPicker": "picker"},
            "lora": {"adapters": {"sql": "org/sql"}, "maxAdapters": 2, "maxRank": 32},
        }
        values = {"models": {"m": settings}}
        count = 0

        def quoted(value: Any) -> Any:
            nonlocal count
            if isinstance(value, dict):
                return {name: quoted(each) for name, each in value.items()}
            if type(value) in (int, float):
                count += 1
                return str(value)
            return value

        assert manifest_text(quoted(values)) == manifest_text(values)
        assert count > 30


class TestEnvironment:
    SECRET = {"secretKeyRef": {"name": "s", "key": "k"}}  # noqa: RUF012

    def test_takes_texts_numbers_booleans_and_references(self) -> None:
        found = environment(
            one_model(env={"COUNT": 1048576, "SHARE": 0.5, "ON": True, "NAME": "a", "KEY": {"valueFrom": self.SECRET}})
        )
        assert found["COUNT"] == "1048576"
        assert found["SHARE"] == "0.5"
        assert found["ON"] == "true"
        assert found["NAME"] == "a"
        assert found["KEY"] == self.SECRET
        assert found["VLLM_NO_USAGE_STATS"] == "1"

    def test_may_be_a_list_whose_order_stays(self) -> None:
        entries = [
            {"name": "Z", "value": 1},
            {"name": "A", "value": "$(Z)/a"},
            {"name": "KEY", "valueFrom": self.SECRET},
        ]
        container = server(one_model(env=entries))
        assert container["env"][-3:] == [{"name": "Z", "value": "1"}, *entries[1:]]
        assert environment(one_model(env=entries))["VLLM_NO_USAGE_STATS"] == "1", "the defaults' map is merged"

    def test_of_the_model_replaces_that_of_all(self) -> None:
        values = one_model(env={"B": "model", "USER": "me"})
        values["modelDefaults"] = {"env": [{"name": "B", "value": "all"}, {"name": "C", "value": "all"}]}
        found = environment(values)
        assert (found["B"], found["C"], found["USER"]) == ("model", "all", "me")

    def test_a_token_may_come_from_a_reference(self) -> None:
        assert environment(one_model(env={"HF_TOKEN": {"valueFrom": self.SECRET}}))["HF_TOKEN"] == self.SECRET


class TestSources:
    @pytest.mark.parametrize(
        ("source", "volume"),
        [
            ({"claim": "models"}, {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}),
            ({"hostPath": "/data/models"}, {"hostPath": {"path": "/data/models", "type": "Directory"}}),
            (
                {"image": "registry/models/llama:1"},
                {"image": {"reference": "registry/models/llama:1", "pullPolicy": "IfNotPresent"}},
            ),
        ],
    )
    def test_with_a_volume(self, source: dict[str, str], volume: Manifest) -> None:
        values = from_source(**source, path="llama")
        assert {"name": "model", **volume} in pod_spec(values)["volumes"]
        assert {"name": "model", "mountPath": "/models", "readOnly": True} in server(values)["volumeMounts"]
        assert server(values)["args"][0] == "/models/llama"
        assert environment(values)["HF_HUB_OFFLINE"] == "1"

    def test_a_bucket_is_streamed(self) -> None:
        values = from_source(s3="s3://bucket/llama")
        assert server(values)["args"][0] == "s3://bucket/llama"
        assert "model" not in [volume["name"] for volume in pod_spec(values)["volumes"]]

    def test_the_account_may_have_a_role(self) -> None:
        values = one_model() | {"serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn", "number": 1}}}
        assert find(render(values), "ServiceAccount")["metadata"]["annotations"] == {
            "eks.amazonaws.com/role-arn": "arn",
            "number": "1",
        }


class TestTexts:
    def test_of_labels_and_annotations_may_be_numbers(self) -> None:
        values = one_model(podLabels={"version": 2}, podAnnotations={"scrape": True}, nodeSelector={"gpus": 8}) | {
            "commonLabels": {"tier": 1}
        }
        deployment = find(render(values), "Deployment")
        template = deployment["spec"]["template"]
        assert template["metadata"]["labels"].items() >= {"version": "2", "tier": "1"}.items()
        assert template["metadata"]["annotations"]["scrape"] == "true"
        assert template["spec"]["nodeSelector"] == {"gpus": "8"}
        assert deployment["metadata"]["labels"]["tier"] == "1"

    def test_a_label_of_all_and_of_a_monitor_is_there_once(self) -> None:
        values = one_model() | {
            "commonLabels": {"release": "a"},
            "monitoring": {"rules": {"create": "always", "labels": {"release": "prometheus"}}},
        }
        assert find(render(values), "PrometheusRule")["metadata"]["labels"]["release"] == "prometheus"
        assert manifest_text(values).count("release: prometheus") == 1


@pytest.mark.parametrize(
    ("storage_class", "spec"), [("", {}), ("-", {"storageClassName": ""}), ("fast", {"storageClassName": "fast"})]
)
def test_storage_class(storage_class: str, spec: dict[str, str]) -> None:
    values = one_model(
        cache={"kind": "newClaim", "storageClass": storage_class},
        loadTest={"run": "first", "results": {"storageClass": storage_class}},
    )
    claims = [each for each in render(values) if each["kind"] == "PersistentVolumeClaim"]
    assert len(claims) == 2
    for claim in claims:
        assert {key: value for key, value in claim["spec"].items() if key == "storageClassName"} == spec


def test_pull_secrets_of_all_and_of_a_model() -> None:
    values = one_model(image={"pullSecrets": ["b", {"name": "a"}]}, loadTest={"run": "first"})
    values["imagePullSecrets"] = [{"name": "a"}, "c"]
    manifests = render(values)
    pods = [find(manifests, kind)["spec"]["template"]["spec"] for kind in ("Deployment", "Job")]
    for pod in (*pods, find(manifests, "Pod")["spec"]):
        assert pod["imagePullSecrets"] == [{"name": "a"}, {"name": "c"}, {"name": "b"}]


class TestBudgetsAndRollouts:
    @pytest.mark.parametrize(
        ("settings", "spec"),
        [
            ({"maxUnavailable": "50%"}, {"maxUnavailable": "50%"}),
            ({"maxUnavailable": "2"}, {"maxUnavailable": 2}),
            ({"minAvailable": 0}, {"minAvailable": 0}),
            ({"minAvailable": "75%"}, {"minAvailable": "75%"}),
        ],
    )
    def test_a_disruption_budget_has_one_limit(self, settings: dict[str, Any], spec: dict[str, Any]) -> None:
        found = find(render(one_model(podDisruptionBudget=settings)), "PodDisruptionBudget")["spec"]
        assert {key: found[key] for key in found if key.endswith("vailable")} == spec

    def test_shares_of_a_rollout(self) -> None:
        for nodes, kind in ((1, "Deployment"), (2, "LeaderWorkerSet")):
            text = yaml.safe_dump(find(render(one_model(nodes=nodes, rollout={"maxSurge": "25%"})), kind))
            assert "maxSurge: 25%" in text
            assert "maxUnavailable: 1" in text

    def test_recreate(self) -> None:
        values = one_model(rollout={"type": "Recreate"})
        assert find(render(values), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_load_balancer_class() -> None:
    settings = {"type": "LoadBalancer", "loadBalancerClass": "nlb", "loadBalancerSourceRanges": ["10.0.0.0/8"]}
    spec = find(render(one_model(service=settings)), "Service")["spec"]
    assert {key: spec[key] for key in settings} == settings


def test_adapters_are_arguments() -> None:
    arguments = server(example("lora"))["args"]
    assert {"--enable-lora", "--max-loras=2", "--max-lora-rank=32"} <= set(arguments)
    first = arguments.index("--lora-modules") + 1
    assert arguments[first : first + 2] == ["sql=example/llama-3.1-8b-sql-lora", "support=/adapters/support"]
    assert not any("lora" in argument for argument in server(one_model())["args"])


def test_claims_bring_the_devices() -> None:
    claim = {"name": "gpus", "resourceClaimTemplateName": "two-h200"}
    values = one_model(accelerator={"count": 2, "claims": [claim]})
    pod = pod_spec(values)
    assert pod["resourceClaims"] == [claim]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["resources"]["claims"] == [{"name": "gpus"}]
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert "--tensor-parallel-size=2" in pod["containers"][0]["args"]
    kubernetes_validate.validate(find(render(values), "Deployment"), "1.34", strict=True)


class TestDevices:
    @pytest.fixture(scope="class")
    def script(self) -> ModuleType:
        """The script of the init container."""
        spec = importlib.util.spec_from_file_location("device", CHART / "files" / "device.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_of_another_kind_are_named_with_the_setting(self, script: ModuleType) -> None:
        hopper, volta = ("NVIDIA H200", (9, 0)), ("NVIDIA V100", (7, 0))
        assert script.problem([hopper, hopper], 2, "models.m") is None
        message = script.problem([hopper, volta], 2, "models.m")
        assert "GPU 1 is NVIDIA V100, compute capability 7.0" in message
        assert "models.m.nodeSelector" in message
        assert "models.m.accelerator.count is 2, and this pod sees 1" in script.problem([hopper], 2, "models.m")

    @pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 1)])
    def test_are_refused_as_the_plugin_refuses_them(self, script: ModuleType, capability: tuple[int, int]) -> None:
        refused = script.problem([("a GPU", capability)], 1, "models.m") is not None
        try:
            stock_kernels(Device("cuda", capability))
        except ValueError:
            assert refused
        else:
            assert not refused

    def test_are_checked_before_the_server_loads(self) -> None:
        values = one_model(accelerator={"count": 2}, initContainers=[{"name": "own"}])
        check, own = pod_spec(values)["initContainers"]
        assert own == {"name": "own"}
        assert check["command"] == ["python3", "/etc/vllm-sparse/scripts/device.py"]
        assert check["args"] == ["2", "models.m"]
        assert check["image"] == server(values)["image"]
        # The scheduler takes the larger of both requests, so equal ones cost nothing.
        assert check["resources"] == server(values)["resources"]
        assert "device.py" in find(render(values), "ConfigMap", "-scripts")["data"]

    @pytest.mark.parametrize(
        "accelerator", [{"count": 0}, {"check": False}, {"resource": "amd.com/gpu"}], ids=["cpu", "off", "amd"]
    )
    def test_are_not_checked_where_there_is_nothing_to_know(self, accelerator: dict[str, Any]) -> None:
        assert "initContainers" not in pod_spec(one_model(accelerator=accelerator))


class TestRouter:
    def rules(self) -> list[Manifest]:
        rules: list[Manifest] = find(render(example("two-models")), "HTTPRoute")["spec"]["rules"]
        return rules

    def test_picks_the_model_by_every_name_that_it_has(self) -> None:
        names = [{match["headers"][0]["value"] for match in rule["matches"]} for rule in self.rules()]
        assert names == [{"qwen-coder", "default"}, {"small"}]
        assert {match["headers"][0]["name"] for rule in self.rules() for match in rule["matches"]} == {
            "X-Gateway-Model-Name"
        }

    def test_knows_adapters_too(self) -> None:
        values = example("lora") | {"router": {"enabled": True, "parentRefs": [{"name": "g"}]}}
        (rule,) = find(render(values), "HTTPRoute")["spec"]["rules"]
        assert {match["headers"][0]["value"] for match in rule["matches"]} == {"llama", "sql", "support"}

    def test_lets_in_the_api_only(self) -> None:
        matches = [match for rule in self.rules() for match in rule["matches"]]
        assert {(match["method"], match["path"]["value"]) for match in matches} == {("GET", "/v1"), ("POST", "/v1")}

    def test_leads_to_pools_and_services(self) -> None:
        manifests = render(example("two-models"))
        (pool,), (service,) = (rule["backendRefs"] for rule in self.rules())
        assert find(manifests, "InferencePool")["metadata"]["name"] == pool["name"]
        assert (pool["group"], pool["kind"]) == ("inference.networking.k8s.io", "InferencePool")
        assert service == {"name": "example-vllm-sparse-small", "port": 8000}

    def test_a_pool_has_the_servers_of_its_model_only(self) -> None:
        manifests = render(example("two-models"))
        spec = find(manifests, "InferencePool")["spec"]
        deployments = [each for each in manifests if each["kind"] == "Deployment"]
        matched = [
            each["metadata"]["name"]
            for each in deployments
            if spec["selector"]["matchLabels"].items() <= each["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert matched == ["example-vllm-sparse-coder"]
        assert spec["targetPorts"] == [
            {"number": deployments[0]["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]}
        ]
        assert spec["endpointPickerRef"] == {"name": "coder-epp", "port": {"number": 9002}, "failureMode": "FailOpen"}

    def test_a_route_of_one_model_leads_to_its_pool_too(self) -> None:
        values = copy.deepcopy(example("two-models"))
        values["models"]["coder"]["httpRoute"] = {"enabled": True, "parentRefs": [{"name": "g"}]}
        route = find(render(values), "HTTPRoute", "-coder")
        assert route["spec"]["rules"][0]["backendRefs"][0]["kind"] == "InferencePool"


def test_extras_of_the_test_may_be_taken_away() -> None:
    values = one_model(test={"extras": {"sparse_prefill": "dense", "flexprefill_min_budget_tokens": None}})
    extras = yaml.safe_load(find(render(values), "Pod")["spec"]["containers"][0]["args"][2])
    assert extras["sparse_prefill"] == "dense"
    assert "flexprefill_min_budget_tokens" not in extras


def test_the_helm_test_says_what_a_server_that_never_came_may_mean() -> None:
    script = CHART / "files" / "completion.py"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = subprocess.run(
        [sys.executable, str(script), f"http://127.0.0.1:{port}", "m", "{}", "10", "5"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"http://127.0.0.1:{port} does not answer" in done.stderr
    assert "init container `device`" in done.stderr


def test_the_preset_header_is_a_middleware_that_there_is() -> None:
    (argument,) = set(server(one_model(presetHeader=True))["args"]) - set(server(one_model())["args"])
    name, _, path = argument.partition("=")
    assert (name, path) == ("--middleware", f"{PresetHeader.__module__}.{PresetHeader.__name__}")
