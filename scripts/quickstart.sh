#!/usr/bin/env bash
# From nothing to a quantized model: environment, embedded model, run, result.
# Further arguments go to the command, for example: bash scripts/quickstart.sh --model.scheme.bits 4
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
ensure_environment
exec .venv/bin/python -m lightning_gsq fit --config quickstart "$@"
