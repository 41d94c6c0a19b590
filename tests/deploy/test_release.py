"""A release's life through Helm, against a stand-in for the API server."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest

from tests.deploy.chart import CHART, EXAMPLES, example, one_model, render
from tests.deploy.kubernetes_api import Cluster, running_cluster

RELEASE, NAMESPACE = "example", "llm"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def helm(cluster: Cluster) -> helm_python.Config:
    # Memory: the stand-in does not read the protobuf in which Helm writes its own secrets.
    return helm_python.Config(kubeconfig_content=cluster.kubeconfig, storage_driver="memory", namespace=NAMESPACE)


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Values of an example, its CRD objects left to discovery."""
    values = copy.deepcopy(values)
    values.pop("monitoring", None)
    return values


def test_install_upgrade_rollback_uninstall(cluster: Cluster, chart: helm_python.Chart) -> None:
    client = helm(cluster)
    values = example("tensor-parallel")

    installed = client.install(chart, RELEASE, values, namespace=NAMESPACE)
    assert installed["status"] == "deployed"
    deployment = cluster.objects["Deployment", "example-vllm-sparse-small"]
    assert {"Deployment", "ScaledObject", "HorizontalPodAutoscaler", "HTTPRoute", "Ingress"} <= cluster.kinds()
    assert "Pod" not in cluster.kinds(), "the pods of `helm test` wait for `helm test`"
    first = copy.deepcopy(cluster.objects)

    del values["models"]["large"]
    values["models"]["small"]["drain"] = {"requestSeconds": 30}
    client.upgrade(chart, RELEASE, values, namespace=NAMESPACE)
    upgraded = cluster.objects["Deployment", "example-vllm-sparse-small"]
    assert upgraded["spec"]["selector"] == deployment["spec"]["selector"], "a selector cannot be changed"
    assert upgraded["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 15 + 30 + 20
    assert ("Deployment", "example-vllm-sparse-large") not in cluster.objects

    client.rollback(RELEASE)
    assert cluster.objects == first
    assert [entry["revision"] for entry in client.history(RELEASE)] == [1, 2, 3]

    client.uninstall(RELEASE)
    assert list(cluster.objects) == [("PersistentVolumeClaim", "example-vllm-sparse-small-results")]


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_installed(shared_cluster: Cluster, chart: helm_python.Chart, name: str) -> None:
    values = example(name)
    installed = helm(shared_cluster).install(chart, RELEASE, values, namespace=NAMESPACE)
    assert installed["status"] == "deployed"
    rendered = {(each["kind"], each["metadata"]["name"]) for each in render(values) if each["kind"] != "Pod"}
    assert rendered <= set(shared_cluster.objects)
    shared_cluster.objects.clear()


def test_an_older_kubernetes_lacks_what_some_values_need(chart: helm_python.Chart) -> None:
    claims = {"count": 1, "claims": [{"name": "gpus", "resourceClaimName": "gpus"}]}
    with running_cluster(kubernetes="1.32") as cluster:
        for values, message in (
            (
                example("air-gapped"),
                r"models\.llama\.source\.image needs Kubernetes 1\.33.*copy the model into a claim",
            ),
            (one_model(accelerator=claims), r"models\.m\.accelerator\.claims needs Kubernetes 1\.34.*resource"),
        ):
            with pytest.raises(helm_python.HelmError, match=message):
                helm(cluster).install(chart, RELEASE, values, namespace=NAMESPACE)


def test_upgrade_to_the_same_values_changes_no_pod(cluster: Cluster, chart: helm_python.Chart) -> None:
    client = helm(cluster)
    client.install(chart, RELEASE, example("cpu"), namespace=NAMESPACE)
    template = copy.deepcopy(cluster.objects["Deployment", "example-vllm-sparse-small"]["spec"]["template"])
    client.upgrade(chart, RELEASE, example("cpu"), namespace=NAMESPACE)
    assert cluster.objects["Deployment", "example-vllm-sparse-small"]["spec"]["template"] == template


def test_a_new_cache_claim_outlives_the_release(cluster: Cluster, chart: helm_python.Chart) -> None:
    client = helm(cluster)
    client.install(chart, RELEASE, example("one-gpu"), namespace=NAMESPACE)
    client.uninstall(RELEASE)
    assert list(cluster.objects) == [("PersistentVolumeClaim", "example-vllm-sparse-llama-cache")]


@pytest.mark.parametrize("has_operator", [True, False])
def test_objects_of_the_prometheus_operator_come_where_it_is(chart: helm_python.Chart, has_operator: bool) -> None:
    without = frozenset() if has_operator else frozenset({"monitoring.coreos.com/v1"})
    with running_cluster(without=without) as cluster:
        installed = helm(cluster).install(chart, RELEASE, with_defaults(example("cpu")), namespace=NAMESPACE)
        assert ({"PodMonitor", "PrometheusRule"} <= cluster.kinds()) is has_operator
        assert ("Nothing scrapes the servers" in installed["notes"]) is not has_operator


def test_an_older_kubernetes_is_refused(chart: helm_python.Chart) -> None:
    with (
        running_cluster(kubernetes="1.29") as cluster,
        pytest.raises(helm_python.HelmError, match=r"requires kubeVersion: >=1\.30\.0-0"),
    ):
        helm(cluster).install(chart, RELEASE, example("cpu"), namespace=NAMESPACE)


def test_a_load_test_comes_and_goes_and_its_results_stay(cluster: Cluster, chart: helm_python.Chart) -> None:
    client = helm(cluster)
    values = with_defaults(example("cpu"))
    client.install(chart, RELEASE, values, namespace=NAMESPACE)
    assert "Job" not in cluster.kinds()
    values["models"]["small"]["loadTest"] = {"run": "first"}
    assert "logs -f job/example-vllm-sparse-small-load-first" in str(
        client.upgrade(chart, RELEASE, values, namespace=NAMESPACE)["notes"]
    )
    values["models"]["small"]["loadTest"] = {"run": "second"}
    client.upgrade(chart, RELEASE, values, namespace=NAMESPACE)
    jobs = [name for kind, name in cluster.objects if kind == "Job"]
    assert jobs == ["example-vllm-sparse-small-load-second"]
    values["models"]["small"]["loadTest"] = {"run": ""}
    client.upgrade(chart, RELEASE, values, namespace=NAMESPACE)
    assert "Job" not in cluster.kinds()
    assert ("PersistentVolumeClaim", "example-vllm-sparse-small-results") in cluster.objects


class TestNotes:
    def notes(self, cluster: Cluster, chart: helm_python.Chart, values: dict[str, Any]) -> str:
        return str(helm(cluster).install(chart, RELEASE, values, namespace=NAMESPACE)["notes"])

    def test_warn_of_what_is_open(self, cluster: Cluster, chart: helm_python.Chart) -> None:
        notes = self.notes(cluster, chart, example("cpu"))
        assert "no API key" in notes
        assert "networkPolicy.enabled is false" in notes
        assert "downloaded again for each new pod" in notes

    def test_do_not_warn_of_what_is_closed(self, cluster: Cluster, chart: helm_python.Chart) -> None:
        assert "WARNING" not in self.notes(cluster, chart, example("one-gpu"))

    def test_say_what_gpus_of_another_kind_look_like(self, cluster: Cluster, chart: helm_python.Chart) -> None:
        assert "init container `device`" in self.notes(cluster, chart, example("one-gpu"))

    def test_name_the_door_of_several_models(self, cluster: Cluster, chart: helm_python.Chart) -> None:
        notes = self.notes(cluster, chart, example("two-models"))
        assert "HTTPRoute example-vllm-sparse, by the header X-Gateway-Model-Name" in notes

    @pytest.mark.parametrize("budget", [{"minAvailable": "100%"}, {"minAvailable": 1}, {"maxUnavailable": 0}], ids=str)
    def test_warn_of_nodes_that_cannot_be_drained(
        self, cluster: Cluster, chart: helm_python.Chart, budget: dict[str, Any]
    ) -> None:
        assert "can be drained" in self.notes(cluster, chart, one_model(podDisruptionBudget=budget))

    def test_warn_of_a_cache_that_one_node_can_mount(self, cluster: Cluster, chart: helm_python.Chart) -> None:
        values = example("one-gpu")
        values["models"]["llama"]["replicas"] = 2
        assert "ReadWriteOnce" in self.notes(cluster, chart, values)
