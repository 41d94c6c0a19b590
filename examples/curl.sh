#!/bin/sh
# Asks a served bundled model by curl: dense, sparse, with a wrong knob; then shows what the server counted.
#
# Usage, in the repository's root, beside `make serve PORT=8200`: PORT=8200 sh examples/curl.sh
# Settings, from the environment: PORT (8000), TOKENS (5000), PYTHON (.venv/bin/python).
set -eu

url=http://127.0.0.1:${PORT:-8000}

ask() {
    "${PYTHON:-.venv/bin/python}" -m loadtest.quality.prompt --tokens "${TOKENS:-5000}" --needles 3 --seed 3 "$@" |
        curl -sS -w '\n%{http_code} after %{time_total} s\n\n' "$url/v1/chat/completions" \
            -H 'Content-Type: application/json' -d @-
}

echo "dense:"
ask

echo "sparse:"
ask --extras '{"sparse_prefill": "dhsa", "sparse_decode": "tidal", "sparse_min_tokens": 1024}'

echo "a wrong knob:"
curl -sS -w '\n%{http_code}\n\n' "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "model": "needle", "prompt": "The code of the", "max_tokens": 5,
  "vllm_xargs": {"sparse_prefill": "flexprefill", "flexprefill_gamma": 1.5}}'

echo "what the server counted:"
curl -sS "$url/metrics" | grep '^vllm_sparse_requests_total'
