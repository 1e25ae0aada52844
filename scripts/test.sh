#!/usr/bin/env bash
# Environment, linter, type checker, tests. Further arguments go to pytest.
# With --only-pytest first, the tests alone: bash scripts/test.sh --only-pytest tests/cli -k help
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
ensure_environment test
if [ "${1:-}" = --only-pytest ]; then
  shift
  OMP_NUM_THREADS=1 exec .venv/bin/pytest --numprocesses auto --dist worksteal "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# On an installed copy, as a user of its types sees it: mypy does not follow editable installs.
rm -rf .venv/installed build  # a stale build would bring back modules that are gone
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --target .venv/installed .
(cd .venv/installed && MYPYPATH="$PWD" ../bin/mypy --config-file ../../pyproject.toml)
# A room imports only rooms below it: the contracts of pyproject.toml.
(cd .venv/installed && PYTHONPATH="$PWD" ../bin/lint-imports --no-cache --no-logo ../../pyproject.toml)
# One process a core, each on one thread: most tests are small, and threads of several processes get in each other's way.
OMP_NUM_THREADS=1 exec .venv/bin/pytest --numprocesses auto --dist worksteal "$@"
