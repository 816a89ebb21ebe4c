#!/usr/bin/env bash
# All tests: the default tier, slow, npu and legacy. Hours on two cores. Options are pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."
status=0
bash tests/legacy.sh --all "$@" || status=$?
.venv/bin/python -m pytest -n 2 -m "not legacy" "$@" || status=$?
exit "$status"
