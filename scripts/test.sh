#!/usr/bin/env bash
# Environment, linter, type checker, tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
ensure_environment test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# On the installed package, from outside the tree, as a user of its types sees it.
.venv/bin/mypy --config-file pyproject.toml
exec .venv/bin/pytest "$@"
