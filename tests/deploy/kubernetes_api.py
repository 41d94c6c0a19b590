"""A stand-in for a Kubernetes API server: discovery, and objects that are stored as they are sent.

Enough for Helm to install, upgrade, roll back and uninstall a release. No controllers, no defaults, no validation.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

# API version -> kind -> plural name of the resource.
RESOURCES: dict[str, dict[str, str]] = {
    "v1": {
        "ConfigMap": "configmaps",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "Pod": "pods",
        "Secret": "secrets",
        "Service": "services",
        "ServiceAccount": "serviceaccounts",
    },
    "apps/v1": {"Deployment": "deployments"},
    "batch/v1": {"Job": "jobs"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "networking.k8s.io/v1": {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "monitoring.coreos.com/v1": {
        "PodMonitor": "podmonitors",
        "PrometheusRule": "prometheusrules",
        "ServiceMonitor": "servicemonitors",
    },
    "keda.sh/v1alpha1": {"ScaledObject": "scaledobjects", "TriggerAuthentication": "triggerauthentications"},
    "leaderworkerset.x-k8s.io/v1": {"LeaderWorkerSet": "leaderworkersets"},
    "gateway.networking.k8s.io/v1": {"HTTPRoute": "httproutes"},
    "inference.networking.k8s.io/v1": {"InferencePool": "inferencepools"},
    "networking.gke.io/v1": {"GCPBackendPolicy": "gcpbackendpolicies", "HealthCheckPolicy": "healthcheckpolicies"},
    "security.istio.io/v1": {"PeerAuthentication": "peerauthentications"},
}


class Cluster:
    """The objects of a stand-in, by ``(kind, name)``, and the requests that changed them."""

    def __init__(self, kubernetes: str, without: frozenset[str]) -> None:
        self.kubernetes = kubernetes
        self.resources = {version: kinds for version, kinds in RESOURCES.items() if version not in without}
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.changes: list[tuple[str, str, str]] = []
        self.server: ThreadingHTTPServer | None = None

    def kinds(self) -> set[str]:
        """Kinds of which there are objects."""
        return {kind for kind, _ in self.objects}

    @property
    def kubeconfig(self) -> str:
        """How clients reach it."""
        assert self.server is not None
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        text: str = yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "test", "cluster": {"server": url}}],
                "users": [{"name": "test", "user": {}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "llm"}}],
                "current-context": "test",
            }
        )
        return text

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Status and body for a request."""
        parts = path.strip("/").split("/")
        if path == "/version":
            major, minor = self.kubernetes.split(".")
            return 200, {"major": major, "minor": minor, "gitVersion": f"v{self.kubernetes}.0"}
        if path == "/api":
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return 200, {"kind": "APIGroupList", "groups": self._groups()}
        if parts[0] == "openapi":
            return self._openapi(parts)
        version = "v1" if parts[0] == "api" else "/".join(parts[1:3])
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if version not in self.resources:
            return self._missing(path)
        if not rest:
            return 200, self._resource_list(version)
        if rest[0] == "namespaces" and len(rest) == 2:
            return 200, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": rest[1]}}
        plural, name = rest[2], rest[3] if len(rest) > 3 else ""
        kind = next(kind for kind, known in self.resources[version].items() if known == plural)
        return self._object(method, version, kind, name, body)

    def _object(
        self, method: str, version: str, kind: str, name: str, body: dict[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        if method == "GET" and not name:
            items = [known for (of_kind, _), known in self.objects.items() if of_kind == kind]
            return 200, {"apiVersion": version, "kind": f"{kind}List", "metadata": {}, "items": items}
        if body is not None and method in ("POST", "PUT", "PATCH"):
            name = name or str(body["metadata"]["name"])
            known = (kind, name) in self.objects
            self.changes.append(("update" if known else "create", kind, name))
            self.objects[kind, name] = body
            return 200 if known else 201, body
        if (kind, name) not in self.objects:
            return self._missing(name)
        if method == "DELETE":
            self.changes.append(("delete", kind, name))
            del self.objects[kind, name]
            return 200, {"apiVersion": "v1", "kind": "Status", "status": "Success"}
        return 200, self.objects[kind, name]

    def _missing(self, name: str) -> tuple[int, dict[str, Any]]:
        status = {"apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
        return 404, {**status, "message": f"{name} not found"}

    def _groups(self) -> list[dict[str, Any]]:
        groups = []
        for version in self.resources:
            if "/" in version:
                entry = {"groupVersion": version, "version": version.split("/")[1]}
                groups.append({"name": version.split("/")[0], "versions": [entry], "preferredVersion": entry})
        return groups

    def _resource_list(self, version: str) -> dict[str, Any]:
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        resources = [
            {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
            for kind, plural in self.resources[version].items()
        ]
        if version == "v1":
            resources.append({"name": "namespaces", "namespaced": False, "kind": "Namespace", "verbs": verbs})
        return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}

    def _openapi(self, parts: list[str]) -> tuple[int, dict[str, Any]]:
        """Which resources take `fieldValidation`, as Helm asks before it applies on the server's side."""
        paths = {("api/v1" if version == "v1" else f"apis/{version}"): version for version in self.resources}
        if len(parts) == 2:
            return 200, {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}"} for path in paths}}
        version = paths.get("/".join(parts[2:]), "")
        group, _, short = version.rpartition("/")
        parameters = [{"name": "fieldValidation", "in": "query"}]
        operations = {
            f"/{'/'.join(parts[2:])}/namespaces/{{namespace}}/{plural}/{{name}}": {
                "patch": {
                    "parameters": parameters,
                    "x-kubernetes-group-version-kind": {"group": group, "version": short, "kind": kind},
                }
            }
            for kind, plural in self.resources.get(version, {}).items()
        }
        return 200, {"openapi": "3.0.0", "info": {"title": "stand-in", "version": "1"}, "paths": operations}


@contextlib.contextmanager
def running_cluster(kubernetes: str = "1.33", without: frozenset[str] = frozenset()) -> Iterator[Cluster]:
    """A stand-in on a port of its own.

    Args:
        kubernetes: version that it reports.
        without: API versions that it does not offer.
    """
    cluster = Cluster(kubernetes, without)

    class Handler(BaseHTTPRequestHandler):
        def handle_request(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            # Server-side apply sends YAML, of which JSON is a part.
            body = yaml.safe_load(self.rfile.read(length)) if length else None
            status, answer = cluster.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Nothing: pytest shows the changes where a test fails."""

    cluster.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=cluster.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cluster
    finally:
        cluster.server.shutdown()
        cluster.server.server_close()
        thread.join()
