#!/usr/bin/env bash
# The long form of the checks: the same assertions with the full numbers, an hour or more on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export LONG=1
bash tests/legacy.sh
exec .venv/bin/python -m pytest "$@"
