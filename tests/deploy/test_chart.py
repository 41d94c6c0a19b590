"""The chart's objects, as Helm renders them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from tests.deploy.chart import (
    CHART,
    EXAMPLES,
    Manifest,
    example,
    find,
    generated_files,
    one_model,
    pod_spec,
    render,
    server,
)
from tests.vllm_versions import serve_parser
from vllm_sparse.config.names import METHODS, PHASES, knob_schema
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.config.settings import ServerConfig

KUBERNETES_VERSIONS = ("1.30", "1.33", "1.37")
# Oldest Kubernetes that has what an example uses, where that is not the chart's own.
NEEDS = {"air-gapped": "1.33"}
SECRETS = {"apiKey": {"existingSecret": "key-secret"}, "hubToken": {"existingSecret": "token-secret"}}


@pytest.mark.parametrize("path", generated_files(), ids=lambda path: str(path.relative_to(CHART.parent)))
def test_generated_files_are_current(path: Path) -> None:
    assert path.read_text() == generated_files()[path], "run: python deploy/helm/generate.py"


@pytest.mark.parametrize("name", EXAMPLES)
def test_helm_lint_finds_nothing(name: str) -> None:
    report = helm_python.lint(CHART, example(name), strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    assert report["errors"] == []


def arguments(values: Manifest) -> list[str]:
    found: list[str] = server(values)["args"]
    return found


def additional_config(values: Manifest) -> Any:
    (text,) = [argument for argument in arguments(values) if argument.startswith("--additional-config=")]
    return json.loads(text.partition("=")[2])


class TestSparseSettings:
    @pytest.mark.parametrize("name", EXAMPLES)
    def test_of_the_examples_suit_the_plugin(self, name: str) -> None:
        for settings in example(name)["models"].values():
            config = parse_server_config({"sparse": settings.get("sparse", {})}, num_layers=32, num_query_heads=32)
            assert config.model_dump(exclude_unset=True).keys() == settings.get("sparse", {}).keys()

    def test_every_setting_and_knob_passes_through_unchanged(self) -> None:
        sparse = json.loads(ServerConfig().model_dump_json())
        for method in METHODS:
            sparse[method] = {
                knob: schema["default"]
                for phase, methods in PHASES.items()
                if method in methods
                for knob, schema in knob_schema(phase, method).items()
                if schema["default"] is not None
            }
        sparse["methods"] = list(METHODS)
        config = additional_config(one_model(sparse=sparse, additionalConfig={"other": {"a": 1}}))
        assert config == {"sparse": sparse, "other": {"a": 1}}
        parse_server_config({"sparse": sparse}, num_layers=32, num_query_heads=32)

    def test_large_numbers_stay_integers(self) -> None:
        assert '"min_tokens":1048576' in arguments(one_model(sparse={"min_tokens": 1 << 20}))[-1]
        assert "--max-model-len=1048576" in arguments(one_model(engine={"maxModelLen": 1 << 20}))

    def test_none_leave_the_plugin_its_defaults(self) -> None:
        assert not any(argument.startswith("--additional-config") for argument in arguments(one_model()))


class TestArguments:
    @pytest.mark.parametrize("name", EXAMPLES)
    def test_vllm_knows_them(self, name: str) -> None:
        parser = serve_parser()
        for container in server_containers(render(example(name))):
            given = [argument.replace("$(LWS_WORKER_INDEX)", "1") for argument in container["args"]]
            parsed = parser.parse_args(given)
            assert parsed.shutdown_timeout > 0
            assert parsed.attention_backend.lower() == "sparse"

    def test_tensor_parallel_size_covers_devices_and_nodes(self) -> None:
        assert "--tensor-parallel-size=8" in arguments(one_model(accelerator={"count": 8}))
        containers = server_containers(render(example("two-nodes")))
        assert all("--tensor-parallel-size=16" in container["args"] for container in containers)
        assert ["--headless" in container["args"] for container in containers] == [False, True]

    def test_model_from_a_claim_is_offline_and_read_only(self) -> None:
        values = {"models": {"m": {"source": {"claim": "models", "path": "llama"}}}}
        container = server(values)
        assert container["args"][0] == "/models/llama"
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "model"]
        assert mount["readOnly"] is True

    def test_a_claim_may_be_the_model_itself(self) -> None:
        assert arguments({"models": {"m": {"source": {"claim": "models"}}}})[0] == "/models"

    def test_cpu_takes_no_device(self) -> None:
        container = server(one_model(accelerator={"count": 0}, engine={"cpuKvCacheGiB": 7}))
        assert container["image"].endswith("-cpu")
        assert set(container["resources"]["limits"]) == {"memory"}
        assert {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "7"} in container["env"]
        assert not any("gpu" in argument or "tensor-parallel" in argument for argument in container["args"])

    def test_a_digest_wins_over_a_tag(self) -> None:
        digest = "sha256:" + "0" * 64
        assert server(one_model(image={"tag": "x", "digest": digest}))["image"] == f"vllm-sparse@{digest}"

    def test_environment_adds_replaces_and_removes(self) -> None:
        names = {
            entry["name"]: entry.get("value")
            for entry in server(one_model(env={"NCCL_DEBUG": "INFO", "USER": "me", "VLLM_NO_USAGE_STATS": None}))["env"]
        }
        assert names["NCCL_DEBUG"] == "INFO"
        assert names["USER"] == "me"
        assert "VLLM_NO_USAGE_STATS" not in names

    def test_each_with_a_setting_of_its_own_is_known_to_the_check(self) -> None:
        """What the chart itself writes cannot be given a second time by extraArgs."""
        refused = json.loads((CHART / "files" / "checks.json").read_text())["arguments"]
        for name in EXAMPLES:
            for container in server_containers(render(example(name))):
                for argument in container["args"]:
                    assert not argument.startswith("--") or argument.partition("=")[0] in refused, argument


class TestSecrets:
    def test_come_from_existing_secrets_only(self) -> None:
        values = one_model(**SECRETS)
        found = {
            entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in server(values)["env"] if "valueFrom" in entry
        }
        assert found == {
            "HF_TOKEN": {"name": "token-secret", "key": "token"},
            "VLLM_API_KEY": {"name": "key-secret", "key": "api-key"},
        }
        assert not any("secret" in argument for argument in arguments(values))
        assert not [manifest for manifest in render(values) if manifest["kind"] == "Secret"]

    def test_the_helm_test_gets_the_key_but_not_the_token(self) -> None:
        (entry,) = find(render(one_model(**SECRETS)), "Pod")["spec"]["containers"][0]["env"]
        assert entry["name"] == "VLLM_API_KEY"


class TestProbes:
    @pytest.mark.parametrize("seconds", [10, 605, 5400])
    def test_startup_budget_is_one_number(self, seconds: int) -> None:
        container = server(one_model(probes={"startupSeconds": seconds}))
        probe = container["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] == math.ceil(seconds / 10) * 10
        assert "initialDelaySeconds" not in container["livenessProbe"] | container["readinessProbe"]

    def test_a_rollout_does_not_give_up_while_loading(self) -> None:
        deployment = find(render(one_model(probes={"startupSeconds": 5400})), "Deployment")
        assert deployment["spec"]["progressDeadlineSeconds"] > 5400

    def test_model_readiness_asks_for_the_served_names(self) -> None:
        container = server(one_model(probes={"modelReadiness": True}, servedNames=["a", "b"]))
        assert container["readinessProbe"]["exec"]["command"][-2:] == ["a", "b"]
        assert "/etc/vllm-sparse/scripts" in [mount["mountPath"] for mount in container["volumeMounts"]]


class TestDrain:
    def test_one_block_gives_all_three_times(self) -> None:
        drain = {"endpointSeconds": 12, "requestSeconds": 340, "teardownSeconds": 21}
        pod = pod_spec(one_model(drain=drain))
        assert pod["terminationGracePeriodSeconds"] == 12 + 340 + 21
        assert pod["containers"][0]["lifecycle"]["preStop"] == {"sleep": {"seconds": 12}}
        assert "--shutdown-timeout=340" in pod["containers"][0]["args"]

    def test_workers_of_a_group_outlast_its_server(self) -> None:
        leader, worker = server_containers(render(example("two-nodes")))
        assert worker["lifecycle"]["preStop"]["sleep"]["seconds"] == 15 + 300
        assert leader["lifecycle"]["preStop"]["sleep"]["seconds"] == 15

    def test_no_surge_by_default(self) -> None:
        deployment = find(render(one_model()), "Deployment")
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


class TestPods:
    @pytest.mark.parametrize("name", EXAMPLES)
    def test_are_restricted(self, name: str) -> None:
        """What Kubernetes' own standard `restricted` asks for, and a read-only root."""
        pods = list(pod_specs(render(example(name))))
        assert len(pods) >= 2
        for pod in pods:
            assert pod["automountServiceAccountToken"] is False
            assert pod["enableServiceLinks"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }

    @pytest.mark.parametrize("name", EXAMPLES)
    def test_bound_what_they_may_write(self, name: str) -> None:
        for pod in pod_specs(render(example(name))):
            for volume in pod["volumes"]:
                assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], volume

    def test_have_shared_memory(self) -> None:
        (volume,) = [volume for volume in pod_spec(one_model(sharedMemory="3Gi"))["volumes"] if volume["name"] == "shm"]
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}

    def test_spread_over_hosts_by_their_own_labels(self) -> None:
        values = one_model()
        (constraint,) = pod_spec(values)["topologySpreadConstraints"]
        labels = find(render(values), "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()

    def test_openshift_may_choose_the_user(self) -> None:
        context = pod_spec(one_model(podSecurityContext={"runAsUser": None, "fsGroup": None}))["securityContext"]
        assert context["runAsUser"] is None
        assert context["runAsNonRoot"] is True

    @pytest.mark.parametrize(
        ("settings", "changes"),
        [
            ({"files": {"sale.json": "{}"}}, True),
            ({"probes": {"modelReadiness": True}}, True),
            ({"service": {"port": 80}}, False),
        ],
    )
    def test_restart_when_what_they_mount_changes(self, settings: dict[str, Any], changes: bool) -> None:
        def checksum(values: Manifest) -> str:
            annotations = find(render(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
            return str(annotations["checksum/config"])

        assert (checksum(one_model(**settings)) != checksum(one_model())) is changes

    def test_do_not_restart_for_a_new_chart_version(self) -> None:
        labels = find(render(one_model()), "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert not labels.keys() & {"helm.sh/chart", "app.kubernetes.io/version"}

    def test_files_are_mounted(self) -> None:
        values = one_model(files={"tidal.json": '{"roles": []}'})
        assert find(render(values), "ConfigMap", "-files")["data"] == {"tidal.json": '{"roles": []}'}
        assert "/etc/vllm-sparse/files" in [mount["mountPath"] for mount in server(values)["volumeMounts"]]


class TestCache:
    @pytest.mark.parametrize(
        ("cache", "volume"),
        [
            ({"kind": "emptyDir", "size": "9Gi"}, {"emptyDir": {"sizeLimit": "9Gi"}}),
            ({"kind": "newClaim"}, {"persistentVolumeClaim": {"claimName": "example-vllm-sparse-m-cache"}}),
            ({"kind": "existingClaim", "existingClaim": "c"}, {"persistentVolumeClaim": {"claimName": "c"}}),
        ],
    )
    def test_is_where_home_is(self, cache: dict[str, str], volume: Manifest) -> None:
        values = one_model(cache=cache)
        (found,) = [found for found in pod_spec(values)["volumes"] if found["name"] == "cache"]
        assert found == {"name": "cache", **volume}
        (mount,) = [mount for mount in server(values)["volumeMounts"] if mount["name"] == "cache"]
        assert {"name": "HOME", "value": mount["mountPath"]} in server(values)["env"]
        claims = [manifest for manifest in render(values) if manifest["kind"] == "PersistentVolumeClaim"]
        assert len(claims) == (cache["kind"] == "newClaim")


class TestAutoscaling:
    @pytest.mark.parametrize("kind", ["hpa", "keda"])
    @pytest.mark.parametrize("nodes", [1, 2])
    def test_owns_the_number_of_servers(self, kind: str, nodes: int) -> None:
        manifests = render(one_model(nodes=nodes, autoscaling={"kind": kind, "prometheus": "http://p:9090"}))
        (scaled,) = [each for each in manifests if each["kind"] in ("Deployment", "LeaderWorkerSet")]
        assert "replicas" not in scaled["spec"]
        scaler = find(manifests, "HorizontalPodAutoscaler" if kind == "hpa" else "ScaledObject")
        target = scaler["spec"]["scaleTargetRef"]
        assert target == {
            "apiVersion": scaled["apiVersion"],
            "kind": scaled["kind"],
            "name": scaled["metadata"]["name"],
        }

    def test_no_servers_are_allowed(self) -> None:
        assert find(render(one_model(replicas=0)), "Deployment")["spec"]["replicas"] == 0

    def test_keda_asks_for_metrics_that_vllm_has(self) -> None:
        import vllm.v1.metrics.loggers

        values = example("tensor-parallel")
        values["models"]["large"]["autoscaling"]["timeToFirstTokenSeconds"] = 5
        source = Path(vllm.v1.metrics.loggers.__file__).read_text()
        triggers = find(render(values), "ScaledObject")["spec"]["triggers"]
        assert len(triggers) == 4
        for query in (trigger["metadata"]["query"] for trigger in triggers):
            assert set(re.findall(r"{(.*?)}", query)) == {'namespace="llm",model_name="llama-70b"'}
            for name in re.findall(r"vllm:\w+", query):
                assert f'"{re.sub("_(bucket|sum|count)$", "", name)}"' in source, query


class TestWayIn:
    """Clients from outside reach the API, but neither `/metrics` nor the change of the server's settings."""

    def test_of_an_ingress(self) -> None:
        (rule,) = find(render(example("tensor-parallel")), "Ingress")["spec"]["rules"]
        paths = [path["path"] for path in rule["http"]["paths"]]
        assert "/v1/chat/completions" in paths
        assert not any("/v1/sparse/config".startswith(path) or "/metrics".startswith(path) for path in paths)

    def test_of_a_route(self) -> None:
        (rule,) = find(render(example("tensor-parallel")), "HTTPRoute")["spec"]["rules"]
        assert [match["method"] for match in rule["matches"]] == ["GET", "POST"]
        assert {match["path"]["value"] for match in rule["matches"]} == {"/v1"}


class TestNetworkPolicy:
    def policy(self, **settings: Any) -> Manifest:
        values = one_model() | {"networkPolicy": {"enabled": True, **settings}}
        spec: Manifest = find(render(values), "NetworkPolicy")["spec"]
        return spec

    def test_selects_the_servers_and_lets_the_test_in(self) -> None:
        manifests = render(one_model() | {"networkPolicy": {"enabled": True, "from": []}})
        spec = find(manifests, "NetworkPolicy")["spec"]
        pod = find(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
        test_labels = find(manifests, "Pod")["metadata"]["labels"]
        assert spec["podSelector"]["matchLabels"].items() <= pod.items()
        assert "vllm-sparse/model" not in test_labels, "the policy would select the test's pod"
        (peer,) = spec["ingress"][0]["from"]
        assert peer["podSelector"]["matchLabels"].items() <= test_labels.items()

    def test_hub_is_a_choice(self) -> None:
        ports = [port["port"] for rule in self.policy(egress={"hub": False})["egress"] for port in rule["ports"]]
        assert ports == [53, 53]
        assert 443 in [port["port"] for rule in self.policy()["egress"] for port in rule.get("ports", ())]

    def test_the_pods_of_a_group_may_talk(self) -> None:
        spec = find(render(example("two-nodes")), "NetworkPolicy")["spec"]
        group = {"podSelector": {"matchLabels": spec["podSelector"]["matchLabels"] | {"vllm-sparse/model": "huge"}}}
        assert {"from": [group]} in spec["ingress"]
        assert {"to": [group]} in spec["egress"]


class TestLoadTest:
    def manifests(self, **settings: Any) -> list[Manifest]:
        return render(one_model(loadTest={"run": "first", **settings}))

    def container(self, **settings: Any) -> Manifest:
        container: Manifest = find(self.manifests(**settings), "Job")["spec"]["template"]["spec"]["containers"][0]
        return container

    def test_runs_only_where_it_has_a_name(self) -> None:
        assert not [each for each in render(one_model()) if each["kind"] in ("Job", "PersistentVolumeClaim")]
        assert find(self.manifests(), "Job")["metadata"]["name"] == "example-vllm-sparse-m-load-first"

    def test_is_not_repeated_and_ends(self) -> None:
        spec = find(self.manifests(deadlineSeconds=77), "Job")["spec"]
        assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (0, 77)
        assert spec["template"]["spec"]["restartPolicy"] == "Never"

    def test_runs_in_the_folder_of_the_image_that_holds_the_harness(self) -> None:
        folder = self.container()["workingDir"]
        dockerfile = (CHART.parents[1] / "docker" / "Dockerfile").read_text()
        assert dockerfile.count(f"\nCOPY loadtest {folder}/loadtest\n") == 2

    def test_results_have_a_folder_of_the_run_in_a_claim_that_stays(self) -> None:
        manifests = self.manifests(results={"size": "3Gi", "storageClass": "fast"})
        claim = find(manifests, "PersistentVolumeClaim")
        assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert claim["spec"]["resources"] == {"requests": {"storage": "3Gi"}}
        assert claim["spec"]["storageClassName"] == "fast"
        (volume,) = find(manifests, "Job")["spec"]["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        container = self.container()
        (mount,) = container["volumeMounts"]
        assert f"--out={mount['mountPath']}/first" in container["args"]

    def test_results_may_go_to_a_claim_that_exists(self) -> None:
        manifests = self.manifests(results={"existingClaim": "mine"})
        assert not [each for each in manifests if each["kind"] == "PersistentVolumeClaim"]
        (volume,) = find(manifests, "Job")["spec"]["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"] == {"claimName": "mine"}

    def test_the_key_comes_as_a_file(self) -> None:
        manifests = render(one_model(loadTest={"run": "first"}, **SECRETS))
        pod = find(manifests, "Job")["spec"]["template"]["spec"]
        (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
        assert volume["secret"] == {"secretName": "key-secret", "items": [{"key": "api-key", "path": "key"}]}
        (container,) = pod["containers"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
        assert f"--api-key-file={mount['mountPath']}/key" in container["args"]
        assert "env" not in container

    def test_a_scenario_of_your_own(self) -> None:
        manifests = self.manifests(scenarioFile="seed: 3\n", set=["load.rates=[1]"])
        pod = find(manifests, "Job")["spec"]["template"]["spec"]
        (volume,) = [volume for volume in pod["volumes"] if "configMap" in volume]
        assert find(manifests, "ConfigMap", volume["configMap"]["name"])["data"] == {"scenario.yaml": "seed: 3\n"}
        (container,) = pod["containers"]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
        assert container["args"][0] == f"{mount['mountPath']}/scenario.yaml"
        assert container["args"][-1] == "--set=load.rates=[1]"

    def test_neither_service_nor_policy_takes_it_for_a_server(self) -> None:
        manifests = render(one_model(loadTest={"run": "first"}) | {"networkPolicy": {"enabled": True, "from": []}})
        labels = find(manifests, "Job")["spec"]["template"]["metadata"]["labels"]
        assert not find(manifests, "Service")["spec"]["selector"].items() <= labels.items()
        policy = find(manifests, "NetworkPolicy")["spec"]
        assert "vllm-sparse/model" not in labels, "the policy would select the pod of the load test"
        (peer,) = policy["ingress"][0]["from"]
        assert peer["podSelector"]["matchLabels"].items() <= labels.items()

    def test_a_running_server_is_not_restarted_for_it(self) -> None:
        def template(values: Manifest) -> Manifest:
            found: Manifest = find(render(values), "Deployment")["spec"]["template"]
            return found

        assert template(one_model(loadTest={"run": "first"})) == template(one_model())


class TestSelectors:
    @pytest.mark.parametrize("name", EXAMPLES)
    def test_find_the_servers_and_nothing_else(self, name: str) -> None:
        manifests = render(example(name))
        for kind in ("Service", "PodDisruptionBudget"):
            for manifest in (each for each in manifests if each["kind"] == kind):
                selector = manifest["spec"]["selector"].get("matchLabels", manifest["spec"]["selector"])
                matched = [labels for labels in pod_labels(manifests) if selector.items() <= labels.items()]
                assert len(matched) == 1, f"{kind} {manifest['metadata']['name']} selects {matched}"
                assert matched[0]["app.kubernetes.io/component"] == "server"

    def test_monitors_find_what_they_scrape(self) -> None:
        manifests = render(example("tensor-parallel"))
        selector = find(manifests, "ServiceMonitor")["spec"]["selector"]
        services = [manifest["metadata"]["labels"] for manifest in manifests if manifest["kind"] == "Service"]
        assert len(services) == 2
        assert all(selector["matchLabels"].items() <= labels.items() for labels in services)
        assert all("vllm-sparse/model" in labels for labels in services)

    def test_never_hold_what_changes(self) -> None:
        selector = find(render(one_model() | {"commonLabels": {"team": "a"}}), "Deployment")["spec"]["selector"]
        assert set(selector["matchLabels"]) == {
            "app.kubernetes.io/name",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/component",
            "vllm-sparse/model",
        }


def test_common_labels_and_annotations_reach_every_object_and_pod() -> None:
    values = example("tensor-parallel") | {"commonLabels": {"team": "a"}, "commonAnnotations": {"note": "b"}}
    manifests = render(values)
    for manifest in manifests:
        assert manifest["metadata"]["labels"]["team"] == "a", manifest["kind"]
        assert manifest["metadata"]["annotations"]["note"] == "b", manifest["kind"]
    assert all(labels["team"] == "a" for labels in pod_labels(manifests))


def test_extra_objects_are_templates() -> None:
    extra = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-x"}}
    assert find(render(one_model() | {"extraObjects": [extra]}), "ConfigMap", "-x")["metadata"]["name"] == "example-x"


def test_dashboard_and_rules_are_those_of_the_project() -> None:
    manifests = render(example("one-gpu"))
    rules = yaml.safe_load((CHART.parents[1] / "prometheus" / "rules.yaml").read_text())
    assert find(manifests, "PrometheusRule")["spec"] == rules
    dashboard = (CHART.parents[1] / "grafana" / "vllm-sparse.json").read_text()
    text = find(manifests, "ConfigMap", "-dashboard")["data"]["vllm-sparse.json"]
    assert json.loads(text) == json.loads(dashboard)


@pytest.mark.parametrize("kubernetes", KUBERNETES_VERSIONS)
class TestSchemasOfKubernetes:
    @pytest.mark.parametrize("name", EXAMPLES)
    def test_accept_every_object(self, name: str, kubernetes: str) -> None:
        if kubernetes < NEEDS.get(name, ""):
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(find(render(example(name)), "Deployment"), kubernetes, strict=True)
            return
        checked = 0
        for manifest in objects_for_validation(render(example(name))):
            kubernetes_validate.validate(manifest, kubernetes, strict=True)
            checked += 1
        assert checked >= 7

    def test_refuse_a_misspelt_field(self, kubernetes: str) -> None:
        manifest = find(render(one_model()), "Deployment")
        manifest["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(manifest, kubernetes, strict=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_custom_resources_have_known_fields(name: str) -> None:
    for manifest in render(example(name)):
        if manifest["kind"] in CUSTOM_RESOURCES:
            assert set(unknown_fields(manifest["spec"], CUSTOM_RESOURCES[manifest["kind"]], manifest["kind"])) == set()


def test_a_custom_resource_with_a_misspelt_field_is_noticed() -> None:
    spec = find(render(example("tensor-parallel")), "ScaledObject")["spec"]
    spec["triggers"][0]["metadata"]["treshold"] = "1"
    assert list(unknown_fields(spec, CUSTOM_RESOURCES["ScaledObject"], "")) == [".triggers.metadata.treshold"]


CUSTOM_RESOURCES: dict[str, Any] = yaml.safe_load((CHART.parents[2] / "tests/deploy/custom_resources.yaml").read_text())


def unknown_fields(value: Any, known: Any, path: str) -> Iterator[str]:
    """Paths of the fields that a closed description lacks; an empty map or list of it may hold anything."""
    if isinstance(value, dict) and known:
        for name, entry in value.items():
            if name not in known:
                yield f"{path}.{name}"
            else:
                yield from unknown_fields(entry, known[name], f"{path}.{name}")
    elif isinstance(value, list) and known:
        for entry in value:
            yield from unknown_fields(entry, known[0], path)


def pod_templates(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Metadata and spec of everything that becomes pods; the server's own before its workers'."""
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "Job"):
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield from (group["leaderTemplate"], group["workerTemplate"])
        elif manifest["kind"] == "Pod":
            yield manifest


def pod_specs(manifests: list[Manifest]) -> Iterator[Manifest]:
    return (template["spec"] for template in pod_templates(manifests))


def pod_labels(manifests: list[Manifest]) -> list[dict[str, str]]:
    return [template["metadata"]["labels"] for template in pod_templates(manifests)]


def server_containers(manifests: list[Manifest]) -> list[Manifest]:
    containers = [container for pod in pod_specs(manifests) for container in pod["containers"]]
    return [container for container in containers if container["name"] == "server"]


def objects_for_validation(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Every object of Kubernetes' own kinds; of a LeaderWorkerSet its pods."""
    for manifest in manifests:
        if manifest["kind"] == "LeaderWorkerSet":
            for template in pod_templates([manifest]):
                yield {"apiVersion": "v1", "kind": "Pod", **template}
        elif manifest["kind"] not in CUSTOM_RESOURCES:
            yield manifest
