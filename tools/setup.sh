#!/bin/sh
# Finds a Python that this project runs on and hands over to set_up.py, which makes the environment.
#
# Usage: setup.sh serve|test|all     (normally through `make`)
# Settings, from the environment: PYTHON (an interpreter), VENV (the environment's folder), DEVICE (auto, cpu, cuda).
set -eu

# set_up.py runs as a module of the folder tools.
CDPATH='' cd -- "$(dirname -- "$0")/.."
supported="3.11 3.12"

fail() {
    printf 'set-up: %s\n' "$*" >&2
    exit 2
}

# Prints major.minor. Runs the interpreter, because a name on PATH proves nothing: pyenv leaves shims for versions that
# are not active, which only print an error.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

is_supported() {
    case " $supported " in *" $1 "*) return 0 ;; *) return 1 ;; esac
}

python=""
seen=""
if [ -n "${PYTHON:-}" ]; then
    version=$(version_of "$PYTHON") || fail "PYTHON: '$PYTHON' does not run." \
        "Allowed: the name or path of Python 3.11 or 3.12, such as PYTHON=python3.12."
    is_supported "$version" || fail "PYTHON: '$PYTHON' is Python $version. Allowed: 3.11 or 3.12." \
        "Name another, such as PYTHON=python3.12, or leave PYTHON out to have one looked for."
    python=$PYTHON
else
    for candidate in python3.12 python3.11 python3 python; do
        version=$(version_of "$candidate") || continue
        if is_supported "$version"; then
            python=$candidate
            break
        fi
        seen="$seen $candidate=$version"
    done
    [ -n "$python" ] || fail "no Python 3.11 or 3.12 found (looked for python3.12, python3.11, python3 and python;" \
        "found:${seen:- none}). Install one (Debian 12 and Ubuntu 24.04: apt-get install python3 python3-venv), or" \
        "name one: make PYTHON=/path/to/python3.12."
fi

exec "$python" -m tools.set_up "$@"
