#!/usr/bin/env bash
# Lint, types and tests in an environment of their own; arguments go to pytest.
# Without any, slow tests are left out: -m "slow or not slow" runs them all.
#   ZORN_VENV         the environment (.venv-test); reused when it exists
#   PYTHON            what makes it (python3.11 where found, else python3)
#   ZORN_CONSTRAINTS  requirements to install beside ours, e.g. "jax==0.11.2"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  # A version manager's shim can exist and yet not run.
  if python3.11 -c "" 2>/dev/null; then PYTHON=python3.11; fi
fi
venv=${ZORN_VENV:-.venv-test}

if [[ ! -x $venv/bin/pip ]]; then
  "$PYTHON" -m venv "$venv"
elif [[ $("$venv/bin/python" -V) != "$("$PYTHON" -V)" ]]; then
  echo "$venv holds $("$venv/bin/python" -V), but $PYTHON is" \
    "$("$PYTHON" -V). Remove it, or set ZORN_VENV to another folder." >&2
  exit 1
fi
venv=$(cd "$venv" && pwd)

# The stamp is what was installed: equal means there is nothing to do.
wanted=$(pwd; echo "${ZORN_CONSTRAINTS:-}"; cat pyproject.toml)
if [[ $(cat "$venv/installed.txt" 2>/dev/null) != "$wanted" ]]; then
  # Unquoted on purpose: one word per requirement.
  "$venv/bin/pip" install -qq --disable-pip-version-check \
    -e ".[test]" ${ZORN_CONSTRAINTS:-}
  echo "$wanted" >"$venv/installed.txt"
fi

PATH=$venv/bin:$PATH
ruff check
ruff format --check
pyrefly check --python-interpreter-path "$venv/bin/python"
pytest -q -n 2 -m "not slow" "$@"
