"""``vllm-sparse quality``: what sparse settings cost in quality on a real model, beside dense on the same server.

    vllm-sparse quality MODEL --output FOLDER                       starts a server for it, and ends it
    vllm-sparse quality --url http://127.0.0.1:8000 --output FOLDER   asks one that runs

Every prompt is asked dense and with each variant, on one server, cached blocks apart, in random order. The same command
again goes on where a run was interrupted. FOLDER gets journal.jsonl, results.json, results.csv and report.html. With
--gate the exit status says whether all variants pass the quality gate: 0 passed, 1 failed, 3 undecided.

Without --variant, each method that the server offers is measured at its defaults. `vllm-sparse quality report FOLDER
...` makes the report of one journal or of several on the same model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS
from vllm_sparse.quality.corpus import Corpus
from vllm_sparse.quality.journal import NAME, Journal, JournalError, Run
from vllm_sparse.quality.launch import Launch, serving
from vllm_sparse.quality.measures.answers import answer_jobs, question_jobs
from vllm_sparse.quality.measures.context import Context
from vllm_sparse.quality.measures.decoding import decoding_jobs
from vllm_sparse.quality.measures.generation import generation_jobs
from vllm_sparse.quality.measures.language import language_jobs
from vllm_sparse.quality.measures.speed import speed_jobs
from vllm_sparse.quality.measures.texts import texts
from vllm_sparse.quality.questions import read_questions
from vllm_sparse.quality.records import DENSE
from vllm_sparse.quality.report.command import report
from vllm_sparse.quality.schedule import Job, run_jobs
from vllm_sparse.quality.served_model import (
    LocalTokenizer,
    ServedModel,
    ServerError,
    ServerTokenizer,
    Tokenizer,
)
from vllm_sparse.quality.tasks.documents import KINDS
from vllm_sparse.quality.tasks.task import Task
from vllm_sparse.quality.variants import (
    BASELINES,
    PHASES,
    Variant,
    baseline_variants,
    default_variants,
    least_preset_tokens,
    parse_variant,
)
from vllm_sparse.server_process import StartError

MEASURES = ("speed", "answers", "language", "decoding", "generation", "recall")
"""In the order in which they run: what is timed runs alone."""
# vLLM's default of prompt tokens in a step of a server on a data-centre GPU.
RECALL_CHUNK_TOKENS = 8192


def main(arguments: list[str]) -> int:
    """Command line; returns the exit status."""
    own, server_arguments = _split(arguments)
    parser = _parser()
    given = parser.parse_args(own)
    if (given.model is None) == (given.url is None):
        parser.error("either MODEL (a server is started for it) or --url (one that runs) is needed")
    if given.url is not None and server_arguments:
        parser.error(f"{shlex.join(server_arguments)}: arguments after -- are of the server that MODEL starts")
    try:
        variants = [parse_variant(text) for text in given.variant]
        questions = read_questions(given.questions) if given.questions else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1 or name == DENSE:
            parser.error(f"--variant {name}: the name is taken; give each variant a name of its own")
    try:
        with _server(given, variants, server_arguments) as (url, by_script):
            run = _measure(given, url, by_script, variants, questions)
    except (ServerError, StartError, JournalError, ValueError) as error:
        print(f"vllm-sparse quality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on. So far: {given.output / NAME}", file=sys.stderr)
        return 130
    return report(run, given.output, given.gate)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command's arguments, and those after ``--``."""
    if "--" not in arguments:
        return list(arguments), []
    place = arguments.index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-sparse quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name or folder; vllm serve's arguments after --")
    parser.add_argument("--url", help="of an OpenAI-compatible server, without a path")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--variant", action="append", default=[], help="NAME=JSON of sampling extras; repeatable")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="lengths (default %(default)s)")
    parser.add_argument(
        "--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="(default: all of them)"
    )
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS), help="of tasks (all)")
    parser.add_argument("--prompts", type=int, default=40, help="of each kind and length (default %(default)s)")
    parser.add_argument(
        "--share-documents",
        action="store_true",
        help="compute only the last 1,024 tokens of a sparse prompt anew for each question about a document; several "
        "times as fast, but every prompt then ends in a short chunk, as after a hit in the prefix cache",
    )
    parser.add_argument("--texts", type=int, default=16, help="of a length, for language (default %(default)s)")
    parser.add_argument("--told-texts", type=int, default=8, help="of a length, for decoding (default %(default)s)")
    parser.add_argument("--told-tokens", type=int, default=512, help="told in each (default %(default)s)")
    parser.add_argument("--generations", type=int, default=4, help="free ones of a length (default %(default)s)")
    parser.add_argument("--generated", type=int, default=1000, help="tokens of each, to 4000 (default %(default)s)")
    parser.add_argument("--recall-texts", type=int, default=2, help="of a length, for recall (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed requests of a length (default %(default)s)")
    parser.add_argument(
        "--baselines",
        type=float,
        nargs="*",
        default=[0.15, 0.4],
        metavar="DENSITY",
        help="densities of the baselines streaming, random and oracle; none: no baselines (default %(default)s)",
    )
    parser.add_argument("--questions", type=Path, help="your own, JSON lines of prompt and answers; asked as well")
    parser.add_argument("--text", type=Path, help="folder of texts that tasks are made of (default: installed ones)")
    parser.add_argument("--min-tokens", type=int, default=1024, help="sparse_min_tokens (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=20261129, help="of all that is drawn (default %(default)s)")
    parser.add_argument("--gate", action="store_true", help="end with the status of the quality gate")
    parser.add_argument("--served-model-name", help="which, where a server has several")
    parser.add_argument("--api-key-file", type=Path, help="file with the server's key")
    parser.add_argument("--tokenizer", help="name or folder, for servers without /tokenize")
    parser.add_argument(
        "--chat-template-kwargs", type=json.loads, default={}, help="JSON, such as '{\"enable_thinking\": false}'"
    )
    return parser


@contextmanager
def _server(
    given: argparse.Namespace, variants: Sequence[Variant], server_arguments: Sequence[str]
) -> Iterator[tuple[str, bool]]:
    """URL of the server, and whether it is told tokens by a script."""
    if given.url is not None:
        yield given.url.rstrip("/"), False
        return
    import torch

    chosen = {variant.extras.get(f"sparse_{phase}") for variant in variants for phase in PHASES}
    known = {*PREFILL_METHODS, *DECODE_METHODS}
    methods = [method for method in known if method in chosen]
    if not variants or any("sparse_preset" in variant.extras for variant in variants):
        methods = sorted(known - set(BASELINES) | set(methods))
    methods += [method for method in BASELINES if given.baselines and method not in methods]
    # Of the densest baseline at the longest context, rounded up as pages and forced tokens do.
    list_tokens = round(max(given.baselines, default=0) * max(given.tokens)) + 512
    by_script = not torch.cuda.is_available()
    launch = Launch(given.model, sorted(methods), list_tokens, server_arguments, by_script)
    given.output.mkdir(parents=True, exist_ok=True)
    print(f"starting a server for {given.model}; its log: {given.output / 'server.log'}", flush=True)
    with serving(launch, given.output) as url:
        yield url, launch.by_script


def _measure(
    given: argparse.Namespace, url: str, by_script: bool, variants: list[Variant], questions: Sequence[Task]
) -> Run:
    """Run all jobs that the journal does not have."""
    api_key = given.api_key_file.read_text().strip() if given.api_key_file else None
    model = ServedModel(url, given.served_model_name, api_key)
    _check_lengths(model, given.tokens)
    variants = [*variants, *_more_variants(model, given, variants)]
    tokenizer: Tokenizer
    if given.tokenizer:
        tokenizer = LocalTokenizer(given.tokenizer, given.chat_template_kwargs)
    else:
        tokenizer = ServerTokenizer(model, given.chat_template_kwargs)
    corpus = Corpus.of_folder(given.text) if given.text else Corpus.installed()
    facts = {
        "model": given.model or model.name,
        "seed": given.seed,
        "min_tokens": given.min_tokens,
        "told_tokens": given.told_tokens,
        "generated_tokens": given.generated,
        "share_documents": given.share_documents,
        "text": str(given.text or "installed"),
        "questions": str(given.questions or ""),
    }
    journal = Journal(given.output, facts, variants)
    context = Context(model, tokenizer, corpus, given.seed, given.min_tokens, uuid.uuid4().hex)
    try:
        for measure in MEASURES:
            if measure == "recall" and measure in given.measures:
                _recall(given, context, variants, journal)
            elif measure in given.measures:
                jobs = list(_jobs(measure, given, context, variants, questions, by_script))
                concurrency = 1 if measure == "speed" else given.concurrency
                run_jobs(measure, jobs, journal, concurrency, given.seed)
    finally:
        journal.close()
    return journal.run


def _check_lengths(model: ServedModel, lengths: Sequence[int]) -> None:
    for length in lengths:
        if length < 1024:
            raise ValueError(f"--tokens {length}: 1024 or more is allowed; shorter prompts have nothing to leave out")
        if model.max_tokens is not None and length > model.max_tokens:
            raise ValueError(
                f"--tokens {length}: the server takes {model.max_tokens} tokens (its --max-model-len) of prompt and "
                "answer together; name lengths up to that"
            )


def _more_variants(model: ServedModel, given: argparse.Namespace, variants: Sequence[Variant]) -> list[Variant]:
    """Defaults of all methods where no variant is named, and the baselines."""
    if not model.is_sparse:
        if variants:
            raise ServerError(
                "the server runs without the plugin (no vllm_sparse_ metrics), so that no variant can be asked for; "
                "start it with --attention-backend sparse"
            )
        return []
    offer = model.offer()
    if offer is None:
        if variants and not given.baselines:
            return []
        raise ServerError(
            "the server does not say which methods it has (GET /v1/sparse/methods); start it with VLLM_PLUGINS=sparse, "
            "or name --variant and an empty --baselines"
        )
    more: list[Variant] = []
    if not variants:
        more = list(default_variants(offer.methods))
        if max(given.tokens) >= least_preset_tokens():
            more += [Variant(f"preset {name}", {"sparse_preset": name}) for name in offer.presets]
    if given.baselines:
        missing = [kind for kind in BASELINES if kind not in offer.methods["prefill"]]
        if missing:
            raise ServerError(
                f'the server does not enable the baselines {", ".join(missing)}; add them to its "methods" '
                "(--additional-config, object sparse), or give an empty --baselines"
            )
        compared = [*variants, *more]
        phases = [phase for phase in PHASES if any(variant.is_sparse(phase) for variant in compared)]
        more += baseline_variants(given.baselines, phases)
    return more


def _jobs(
    measure: str,
    given: argparse.Namespace,
    context: Context,
    variants: Sequence[Variant],
    questions: Sequence[Task],
    by_script: bool,
) -> Iterator[Job]:
    if measure == "speed":
        yield from speed_jobs(context, variants, given.tokens, given.repeats)
    elif measure == "answers":
        documents, shared = given.prompts, given.share_documents
        yield from answer_jobs(context, variants, given.tokens, given.kinds, documents, shared)
        yield from question_jobs(context, variants, questions)
    elif measure == "language":
        yield from language_jobs(context, variants, given.tokens, given.texts)
    elif measure == "decoding":
        long_enough = _long_enough(measure, given.tokens, given.told_tokens, given.min_tokens)
        yield from decoding_jobs(context, variants, long_enough, given.told_texts, given.told_tokens, by_script)
    elif measure == "generation":
        long_enough = _long_enough(measure, given.tokens, given.generated, given.min_tokens)
        yield from generation_jobs(context, variants, long_enough, given.generations, given.generated)


def _long_enough(measure: str, lengths: Sequence[int], generated_tokens: int, min_tokens: int) -> list[int]:
    """Lengths whose prompts are sparse beside so many generated tokens; what is left out is said."""
    for length in lengths:
        if length <= generated_tokens + min_tokens:
            print(
                f"{measure} is not measured at {length} tokens: {generated_tokens} of them are generated, and the "
                f"others are no more than --min-tokens {min_tokens}, below which everything is dense"
            )
    return [length for length in lengths if length > generated_tokens + min_tokens]


def _recall(given: argparse.Namespace, context: Context, variants: Sequence[Variant], journal: Journal) -> None:
    """Recall, in this process, of the lengths that the journal does not have yet."""
    import torch

    if given.model is None:
        print("recall is not measured: the model runs in this process for it, so it needs MODEL in place of --url")
        return
    from vllm_sparse.calibration.model import full_layers, text_config
    from vllm_sparse.quality.measures.recall import measure_recall

    try:
        full_layers(text_config(given.model))
    except ValueError as error:
        print(f"recall is not measured: {given.model}: {error}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for length in given.tokens:
        job = f"recall/{length}"
        if job in journal.run.done:
            continue
        at_length = [dataclasses.replace(each, extras=each.extras_at(length), density=None) for each in variants]
        drawn = texts(context, "recall", length, given.recall_texts)
        numbered = [(number, kind, tokens) for number, (kind, tokens) in enumerate(drawn)]
        records = measure_recall(
            given.model, at_length, numbered, length, device, given.min_tokens, RECALL_CHUNK_TOKENS
        )
        journal.add(job, list(records))
