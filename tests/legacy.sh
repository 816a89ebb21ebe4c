#!/usr/bin/env bash
# The bundles on the versions of torch that the published tables name: bash tests/legacy.sh [--all] [pytest's options]
# Makes an environment per version in .legacy/ from 1.5_ and 1.8_requirements.txt (--all: and one of torch 2.1), then
# runs the tier `legacy` (--all: its long forms too). Exit status 3: an interpreter is missing, its tests were not run.
# PYTHON: the interpreter with tests/requirements.txt (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

find_python() { # version such as 3.7
    local found
    if found=$(command -v "python$1") && "$found" -c '' 2>/dev/null; then # pyenv's shims fail where the version is not chosen
        printf '%s' "$found"
    elif command -v pyenv >/dev/null; then
        find "$(pyenv root)/versions" -path "*/$1.*/bin/python" 2>/dev/null | sort -V | tail -n 1
    fi
}

make_environment() { # version of torch, interpreter, arguments of pip install
    local folder=.legacy/$1 interpreter=$2
    shift 2
    if ! cmp -s <(printf '%s\n' "$interpreter" "$@"; cat SPACH-SMLP/1.?_requirements.txt) "$folder/made_from"; then
        rm -rf "$folder"
        "$interpreter" -m venv "$folder"
        "$folder/bin/pip" install -q --disable-pip-version-check "$@"
        "$folder/bin/pip" check
        { printf '%s\n' "$interpreter" "$@"; cat SPACH-SMLP/1.?_requirements.txt; } >"$folder/made_from"
    fi
}

versions='1.5=3.7 1.8=3.8' tier='legacy and not slow'
if [ "${1:-}" = --all ]; then
    versions+=' 2.1=3.10' tier=legacy
    shift
fi
missing='' environments=()
for pair in $versions; do
    torch=${pair%=*} wanted=${pair#*=}
    interpreter=$(find_python "$wanted")
    if [ -z "$interpreter" ]; then
        printf '[Error] Python %s is missing (neither on the PATH nor in pyenv): torch %s is not tested\n' "$wanted" "$torch" >&2
        missing=yes
        continue
    fi
    case $torch in
    2.1) packages=(torch==2.1.0 torchvision==0.16.0 'numpy<2' pillow simplejpeg safetensors tqdm timm==1.0.31) ;;
    *) packages=(-r "SPACH-SMLP/${torch}_requirements.txt") ;; # of the five the one with the most in it
    esac
    make_environment "$torch" "$interpreter" "${packages[@]}" &
    environments+=($!)
done
for pid in "${environments[@]}"; do wait "$pid"; done
"$python" -m pytest -n 2 -m "$tier" "$@" tests/legacy
[ -z "$missing" ] || exit 3
