"""`helm test`: a served model answers, and really sparsely.

Asks /health, /v1/models and one completion with sparse sampling extras; then the server's metrics must show that every
sparse phase of the request ran its method. Usage: completion.py URL MODEL EXTRAS_JSON PROMPT_WORDS TIMEOUT_SECONDS
"""

import http.client
import json
import os
import re
import sys
import time
import urllib.parse

# What a GPU server counts of a step, it shows a step later.
METRIC_SECONDS = 10
KEY = os.environ.get("VLLM_API_KEY")


def ask(connection: http.client.HTTPConnection, path: str, body: dict[str, object] | None = None) -> str:
    """One request; leaves with what the server said unless that is 200."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {KEY}"} if KEY else {})}
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    if reply.status != 200:
        sys.exit(f"{path}: HTTP {reply.status}: {text[:2000]}")
    return text


def sparse_steps(metrics: str, phase: str, method: str) -> float:
    """Chunks or decode steps that ran sparse so far."""
    lines = re.findall(r"^vllm_sparse_density_ratio_count\{(.*)\} (\S+)$", metrics, re.MULTILINE)
    wanted = {f'phase="{phase}"', f'method="{method}"'}
    return sum(float(count) for labels, count in lines if wanted <= set(labels.split(",")))


def main() -> None:
    url, model, extras_json, words, timeout = sys.argv[1:]
    extras = json.loads(extras_json)
    methods = {phase: extras.get(f"sparse_{phase}", "dense") for phase in ("prefill", "decode")}
    # One connection for everything: with several servers behind the service, all of it reaches the same one.
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=float(timeout))

    try:
        ask(connection, "/health")
    except OSError as error:
        sys.exit(
            f"{url} does not answer ({error}). `kubectl describe pod` of the model's pods says why: if they end in the "
            "init container `device`, their GPUs are none that sparse attention runs on."
        )
    listed = [entry["id"] for entry in json.loads(ask(connection, "/v1/models"))["data"]]
    if model not in listed:
        sys.exit(f"/v1/models lists {', '.join(listed)}, not {model}")
    before = ask(connection, "/metrics")

    prompt = " ".join(f"word{index}" for index in range(int(words)))
    # A salt of its own: a prompt from the prefix cache would not be computed.
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "ignore_eos": True, "temperature": 0}
    started = time.monotonic()
    answer = json.loads(
        ask(connection, "/v1/completions", {**body, "cache_salt": f"helm-test-{time.time_ns()}", "vllm_xargs": extras})
    )
    usage = answer["usage"]
    tokens = f"{usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} generated"
    print(f"{model}: {tokens} in {time.monotonic() - started:.1f} s: {answer['choices'][0]['text']!r}")

    for phase, method in methods.items():
        if method == "dense":
            continue
        earlier = sparse_steps(before, phase, method)
        deadline = time.monotonic() + METRIC_SECONDS
        while (steps := sparse_steps(ask(connection, "/metrics"), phase, method)) <= earlier:
            if time.monotonic() > deadline:
                sys.exit(
                    f"{phase} did not run {method} sparsely: vllm_sparse_density_ratio_count did not rise. "
                    "vllm_sparse_fallbacks_total says why; test.promptWords may be too small."
                )
            time.sleep(1)
        print(f"{phase} ran {method}: {steps - earlier:.0f} sparse steps")


if __name__ == "__main__":
    main()
