#!/usr/bin/env bash
# Build what the NPU tests run on: a virtual environment with the real torch_npu, and a CANN in host memory for it.
#   bash tests/npu/build.sh
# NPU_VENV=FOLDER takes the environment in FOLDER, and makes it if it is not there (default: tests/npu/build/venv).
# Needs gcc, g++ and nm (Debian: build-essential), 1.5 GB of disk and a minute.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$here/build"
venv=${NPU_VENV:-$here/build/venv}
for tool in gcc g++ nm; do
    command -v "$tool" >/dev/null || { printf '[Error] %s is missing: apt-get install build-essential\n' "$tool" >&2 && exit 1; }
done
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q -r "$here/requirements.txt"
"$venv/bin/python" "$here/build_cann.py" "$here/build"
[ "$venv" = "$here/build/venv" ] || ln -sfn "$venv" "$here/build/venv" # where the tests find it
