#!/usr/bin/env bash
# The long form of the checks: the same assertions with the full numbers, an hour or more on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
LONG=1 exec .venv/bin/python -m pytest "$@"
