"""Load test of an OpenAI-compatible server: speed and right answers of several methods in one run.

    python -m loadtest.load smoke --serve 'vllm serve loadtest/model/weights --attention-backend sparse'
    python -m loadtest.load long-context --url http://127.0.0.1:8000 --set load.rates='[0.5, 1]'
    python -m loadtest.load mine.yaml --url http://127.0.0.1:8000
    python -m loadtest.load report RUN
    python -m loadtest.load compare RUN_A RUN_B RUN_C

A run writes a folder: journal.jsonl as it goes, and at the end, also after Ctrl-C, report.json, report.html
and requests.csv.
It ends with exit status 1 if a condition of the scenario's fail_on or of --fail-on holds: by default, if a request
failed.
`report` makes these again from the journal, such as after a crash.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import platform
import secrets
import signal
import ssl
import sys
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.load.http import HttpError, Server
from loadtest.load.journal import FORMAT, NAME, Journal
from loadtest.load.plan import Planner, Stage
from loadtest.load.report.command import compare_runs, write_report
from loadtest.load.report.export import ExportError, check_parquet
from loadtest.load.report.statistics import PERCENTILES, samples_needed
from loadtest.load.run import run
from loadtest.load.scenario import Scenario, load_scenario, scenario_names
from loadtest.load.server import ServerError, served, wait_until_healthy
from loadtest.load.settings import ScenarioError
from loadtest.load.workloads.build import PromptMaker
from loadtest.load.workloads.tokens import local_counter, model_counter

SERVER_LOG = "server.log"
FAILED = 1
PARQUET_HELP = "write requests.parquet beside requests.csv (needs pyarrow)"


class UsageError(Exception):
    """What is wrong with the command or the server, worded for the user."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A server that was started for the test must end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if given[:1] == ["compare"]:
            compare_runs(given[1:])
        elif given[:1] == ["report"]:
            _report(given[1:])
        else:
            _load_test(_parser().parse_args(given))
    except (UsageError, ScenarioError, ServerError, ExportError) as error:
        sys.exit(f"loadtest.load: {error}")
    except KeyboardInterrupt:
        sys.exit("loadtest.load: interrupted; `python -m loadtest.load report FOLDER` reports what had run")


def _report(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.load report", description="Make a run's report again.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--parquet", action="store_true", help=PARQUET_HELP)
    arguments = parser.parse_args(given)
    write_report(arguments.run, arguments.parquet)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", help=f"a .yaml file, or one of {', '.join(scenario_names())}")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, without a path")
    parser.add_argument("--serve", metavar="COMMAND", help="start this server for the test; it must listen at --url")
    parser.add_argument("--wait", type=float, metavar="SECONDS", help="wait so long for the server to be healthy")
    parser.add_argument("--model", help="served model name; default: the server's only one")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: the model's, or /tokenize")
    parser.add_argument("--api-key-file", type=Path, help="file that holds the server's API key")
    parser.add_argument("--certificates", type=Path, help="file of the authorities of an https server's certificate")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="replace a setting")
    parser.add_argument(
        "--fail-on",
        action="append",
        metavar="CONDITION",
        help="end with exit status 1 if it holds, such as 'failed_share > 0.01', 'dense: ttft_seconds.p95 > 2', "
        "'overloaded'; in place of the scenario's fail_on; may be repeated",
    )
    parser.add_argument(
        "--clients",
        type=_count,
        default=1,
        metavar="PROCESSES",
        help="that send requests and read streams, where one is too slow: the report warns of that; default: 1",
    )
    parser.add_argument("--parquet", action="store_true", help=PARQUET_HELP)
    parser.add_argument("--out", type=Path, help="folder of the run; default: loadtest-runs/SCENARIO-TIME")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes, 1 or more")
    return int(text)


def _load_test(arguments: argparse.Namespace) -> None:
    settings = list(arguments.set)
    if arguments.fail_on:
        settings.append(f"fail_on={json.dumps(arguments.fail_on)}")
    scenario = load_scenario(arguments.scenario, settings)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = arguments.out or Path("loadtest-runs") / f"{Path(arguments.scenario).stem}-{stamp}"
    url = arguments.url.rstrip("/")
    if arguments.parquet:
        check_parquet()
    if (folder / NAME).exists():
        raise UsageError(f"{folder} holds a run already: name another folder with --out")
    died = None
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(url, arguments))
        process = None
        if arguments.serve:
            _make(folder)
            _show(f"starting the server; its log is {folder / SERVER_LOG}")
            process = stack.enter_context(served(arguments.serve, url, folder / SERVER_LOG))
        elif arguments.wait:
            wait_until_healthy(server, arguments.wait)
        try:
            _run(scenario, arguments, server, folder)
        except BaseException:
            # Whatever it was, what has been measured is reported before.
            if (folder / NAME).exists():
                write_report(folder)
            raise
        died = process.poll() if process is not None else None
    passed = write_report(folder, arguments.parquet)
    if died is not None:
        raise ServerError(f"the server ended with {died} while it was tested; its log is {folder / SERVER_LOG}")
    if not passed:
        sys.exit(FAILED)


def _server(url: str, arguments: argparse.Namespace) -> Server:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path:
        raise UsageError(f"--url {url}: http://HOST:PORT or https://HOST:PORT is wanted, without a path")
    try:
        return Server(url, _headers(arguments.api_key_file), arguments.certificates)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--certificates {arguments.certificates} cannot be read: {error}") from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error.strerror}") from None


def _headers(api_key_file: Path | None) -> dict[str, str]:
    if api_key_file is None:
        return {}
    try:
        key = api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {api_key_file} cannot be read: {error}") from None
    if not key or not key.isprintable() or not key.isascii():
        raise UsageError(f"--api-key-file {api_key_file} holds no key: one line of ASCII is wanted")
    return {"Authorization": f"Bearer {key}"}


def _run(scenario: Scenario, arguments: argparse.Namespace, server: Server, folder: Path) -> None:
    model, root = _served_model(server, arguments.model, scenario)
    _show("making the prompts")
    try:
        counter = local_counter(arguments.tokenizer) if arguments.tokenizer else model_counter(server, model, root)
    except FileNotFoundError as error:
        raise UsageError(f"--tokenizer: {error}") from None
    makers = {
        workload.name: PromptMaker(workload, counter, scenario.seed, scenario.endpoint)
        for workload in scenario.workloads
    }
    salt = secrets.token_hex(4)
    planner = Planner(scenario, makers, salt)
    sweeps, searches = planner.stages(), planner.searches()
    warm_up, at_once = planner.warm_up(), planner.at_once()
    _make(folder)
    with Journal(folder) as journal:
        journal.write("run", _about(scenario, arguments.scenario, server, model, salt))
        _show(_announcement(warm_up, sweeps))
        asyncio.run(run(scenario, warm_up, at_once, sweeps, searches, server, model, journal, arguments.clients))


def _announcement(warm_up: Stage, sweeps: Sequence[Sequence[Stage]]) -> str:
    if not sweeps:
        return f"{len(warm_up.sessions)} requests to warm up, then the search for the highest rate that holds the SLO"
    planned = [len(stage.sessions) for sweep in sweeps for stage in sweep]
    stages = [stage for sweep in sweeps for stage in sweep]
    fewest = min(
        count for stage in stages for count in Counter(session.method for session in stage.sessions).values() if count
    )
    reached = [f"p{one:g}" for one in PERCENTILES if fewest >= samples_needed(one)]
    return (
        f"{len(warm_up.sessions)} requests to warm up, then {sum(planned)} sessions in at most {len(planned)} stages; "
        f"a method has {fewest} of them in a stage, enough for {', '.join(reached) or 'no percentile'}"
    )


def _served_model(server: Server, wanted: str | None, scenario: Scenario) -> tuple[str, str | None]:
    """Name and root of the model to test; the server has to have the scenario's adapters, too."""
    try:
        served = {str(model["id"]): model for model in server.get("/v1/models")["data"]}
        # An adapter's card names the model that it belongs to.
        models = [name for name, model in served.items() if model.get("parent") is None]
    except (HttpError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"no OpenAI-compatible server answers at {server.url} ({error})") from None
    if wanted is None and len(models) != 1:
        raise UsageError(f"name one of the server's models with --model: {', '.join(served)}")
    name = models[0] if wanted is None else wanted
    if name not in served:
        raise UsageError(f"--model {name}: the server has {', '.join(served)}")
    for workload in scenario.workloads:
        unknown = [adapter for adapter in workload.lora.adapters if adapter not in served] if workload.lora else []
        if unknown:
            raise UsageError(
                f"workload {workload.name!r}: lora.adapters: {', '.join(unknown)}: the server has {', '.join(served)}"
            )
    return name, served[name].get("root")


def _about(scenario: Scenario, name: str, server: Server, model: str, salt: str) -> dict[str, Any]:
    """What the journal says of the run as a whole."""
    try:
        server_version = server.get("/version").get("version")
    except (HttpError, AttributeError):
        server_version = None
    return {
        "format": FORMAT,
        "scenario_name": Path(name).stem,
        "scenario": scenario.model_dump(mode="json"),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "url": server.url,
        "model": model,
        "server_version": server_version,
        "salt": salt,
        "client": {"python": platform.python_version(), "machine": platform.platform()},
    }


def _show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
