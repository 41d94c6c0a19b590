"""The command ``vllm-sparse``: a verb, and the module that does it."""

from __future__ import annotations

import importlib
import sys

# Verb to the module whose `main` takes the rest of the arguments and may return an exit status; imported when it is
# asked for. A verb of two words stands before the one that it begins with.
VERBS = {
    "calibrate sale": "vllm_sparse.calibration.sale_command",
    "calibrate tidal": "vllm_sparse.calibration.tidal_command",
    "calibrate tokentopk": "vllm_sparse.calibration.tokentopk_command",
    "inspect": "vllm_sparse.inspect.command",
    "quality report": "vllm_sparse.quality.report.command",
    "quality": "vllm_sparse.quality.command",
}

# Verbs of version 0.1, for one release: what they ran is not installed, it stands in the repository.
MOVED = {
    "bench prefill": "loadtest.benchmarks.kernels.prefill",
    "bench decode": "loadtest.benchmarks.kernels.decode",
    "loadtest": "loadtest.load",
}

USAGE = f"usage: vllm-sparse VERB ...\n\nverbs: {', '.join(VERBS)}; 'vllm-sparse VERB --help' says what one takes"


def main(arguments: list[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: of the command line, the command's name left out; default: this process's.

    Returns:
        The exit status: the verb's own; 2 if there is no such verb, or if a module of the repository has taken its
        place.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    verb = _verb_of(given, VERBS)
    if verb is not None:
        status: int | None = importlib.import_module(VERBS[verb]).main(given[len(verb.split()) :])
        return status or 0
    moved = _verb_of(given, MOVED)
    if moved is not None:
        print(
            f"vllm-sparse: {moved!r} is no verb any more; "
            f"in the root of the vllm_sparse repository, run: python -m {MOVED[moved]} ...",
            file=sys.stderr,
        )
        return 2
    print(f"vllm-sparse: {' '.join(given[:2])!r} is no verb\n{USAGE}", file=sys.stderr)
    return 2


def _verb_of(given: list[str], verbs: dict[str, str]) -> str | None:
    """The first of the verbs that a command line begins with."""
    return next((verb for verb in verbs if given[: len(verb.split())] == verb.split()), None)
