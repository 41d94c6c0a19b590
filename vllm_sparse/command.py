"""The command ``vllm-sparse``: a verb, and the module that does it."""

from __future__ import annotations

import importlib
import sys

# Verb to the module whose `main` takes the rest of the arguments; imported when it is asked for.
VERBS = {
    "bench prefill": "loadtest.benchmarks.kernels.prefill",
    "bench decode": "loadtest.benchmarks.kernels.decode",
    "calibrate sale": "vllm_sparse.calibration.sale_command",
    "calibrate tidal": "vllm_sparse.calibration.tidal_command",
    "inspect": "vllm_sparse.inspect.command",
    "loadtest": "loadtest.load.command",
}

USAGE = f"usage: vllm-sparse VERB ...\n\nverbs: {', '.join(VERBS)}; 'vllm-sparse VERB --help' says what one takes"


def main(arguments: list[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: of the command line, the command's name left out; default: this process's.

    Returns:
        The exit status: 2 if there is no such verb, or if it stands in the repository and the command runs elsewhere.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    verb = next((verb for verb in VERBS if given[: len(verb.split())] == verb.split()), None)
    if verb is None:
        print(f"vllm-sparse: {' '.join(given[:2])!r} is no verb\n{USAGE}", file=sys.stderr)
        return 2
    # Benchmarks and load tests are not installed with the package: they stand in the repository, in whose root the
    # command runs.
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(VERBS[verb])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "loadtest":
            raise
        print(f"vllm-sparse {verb}: run it in the root of the vllm_sparse repository, which holds it", file=sys.stderr)
        return 2
    module.main(given[len(verb.split()) :])
    return 0
