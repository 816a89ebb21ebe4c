#!/usr/bin/env bash
# Everything mechanical about the 40 scripts: options, output folder, ranks, result files, exit status.
#   launch.sh SCRIPT [option of the user ...] -- [flag of the recipe ...]
# Mode and number of cards come from the script's name (train_<mode>_<n>p.sh), the network from its folder.
set -euo pipefail

common=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=$1
shift
test_dir=$(cd "$(dirname "$script")" && pwd)
bundle=$(dirname "$test_dir")
name=$(basename "$script" .sh)
mode=${name#train_}
mode=${mode%_*}
rank_size=${name##*_}
rank_size=${rank_size%p}
python=${PYTHON:-python3}

fail() { # message, exit status
    printf '[Error] %s\n' "$1" >&2
    exit "${2:-1}"
}

main_flags() { # the flags of main.py, read from the source: importing torch to refuse a typing error would take seconds
    grep -l '^def \(build_parser\|add_arguments\)(' "$bundle/main.py" "$common"/*.py | while read -r file; do
        sed -n '/add_argument(/,/)/p' "$file"
    done | grep -oE '"--?[a-zA-Z][a-zA-Z0-9_-]*"' | tr -d '"' | sort -u
}

script_options="--data_path= --device_id= --batch_size= --epochs= --learning_rate= --workers= --resume= --max_steps= \
--device=npu|gpu|cpu --rank_size= --output_dir= --dry-run --help"

recipe=()
for ((i = 1; i <= $#; i++)); do [ "${!i}" != -- ] || recipe=("${@:i+1}"); done
of_recipe() { # flag: its value in the recipe
    for ((i = 0; i < ${#recipe[@]}; i++)); do
        [ "${recipe[i]}" != "$1" ] || { printf '%s' "${recipe[i + 1]}" && return; }
    done
    printf 'that of main.py'
}

usage() {
    printf 'usage: bash %s [option ...]\n\n' "$script"
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    cat <<END

data and cards:
  --data_path=DIR       folder with train/ and val/ ($([ "$mode" = performance ] && echo "default: synthetic images" || echo needed))
  --device=npu|gpu|cpu  default: an NPU if there is one, else CUDA, else the CPU
  --device_id=N         card of a 1p run, and name of its output folder (default: $device_id)
  --rank_size=N         number of cards (default: $rank_size)
  --workers=N           decoding processes per card (default: the cores, shared)
recipe:
  --batch_size=N        per card (default: $(of_recipe --batch-size))
  --epochs=N            default: $(of_recipe --epochs)
  --max_steps=N         end after N steps (default: $(of_recipe --max-steps))
  --learning_rate=X     default: $(of_recipe --lr)
checkpoints:
  --resume=FILE         full: go on from it; eval, finetune: the weights (default: the newest model_best.pth.tar)
  --output_dir=DIR      where they go (default: as main.py says)
this script:
  --dry-run             print command, environment and recipe, and do nothing
  --help                print this

example:
  bash $script $([ "$mode" = performance ] || echo "--data_path=/data/imagenet ")--device_id=1 --workers=16 --print-freq 50

flags of the recipe: ${recipe[*]}
flags of main.py, which may follow and win over the recipe (explained by python3 main.py --help):
END
    main_flags | tr '\n' ' ' | fold -s -w 100 | sed 's/^/  /'
    printf '\n'
}

# --- options: those of the script become flags of main.py; all flags of the user follow the recipe's and so win
data='' resume='' device_id=${ASCEND_DEVICE_ID:-0} dry_run='' epochs='' max_steps=''
user=() known=" $(main_flags | tr '\n' ' ') "
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    word=$1 option=${1%%=*}
    shift
    case $option in
    --help | -h)
        usage
        exit 0
        ;;
    --dry-run)
        dry_run=1
        continue
        ;;
    --data_path | --data-path | --data | --device_id | --rank_size | --resume | --batch_size | --batch-size | --epochs | \
        --epoch | --learning_rate | --max_steps | --max-steps)
        if [ "$word" != "$option" ]; then
            value=${word#*=}
        elif [ $# -gt 0 ] && [ "$1" != -- ]; then
            value=$1
            shift
        else
            fail "$option needs a value" 2
        fi
        ;;
    -*)
        [[ $known == *" $option "* || $option =~ ^-[0-9] ]] ||
            fail "unknown option $option; valid are: $script_options $(main_flags | tr '\n' ' ')" 2
        ;;
    esac
    case $option in
    --data_path | --data-path | --data) data=$value ;;
    --device_id) device_id=$value ;;
    --rank_size) rank_size=$value ;;
    --resume) resume=$value ;;
    --batch_size | --batch-size) user+=(--batch-size "$value" --cpu-batch-size "$value") ;;
    --epochs | --epoch) epochs=$value user+=(--epochs "$value") ;;
    --learning_rate) user+=(--lr "$value") ;;
    --max_steps | --max-steps) max_steps=$value user+=(--max-steps "$value" --cpu-max-steps "$value") ;;
    *) user+=("$word") ;;
    esac
done
shift
[[ $rank_size =~ ^[1-9][0-9]*$ ]] || fail "--rank_size=$rank_size is not a number of cards" 2
[[ $device_id =~ ^[0-9]+$ ]] || fail "--device_id=$device_id is not the number of a card" 2
# Images of other frameworks export RANK_SIZE for good: what the script's name says is what the user sees.
[ "${RANK_SIZE:-$rank_size}" = "$rank_size" ] ||
    printf 'RANK_SIZE=%s is not used, the cards are %s: --rank_size=%s changes that\n' "$RANK_SIZE" "$rank_size" "$RANK_SIZE" >&2
# Whole epochs that the user asks for are not cut short on a CPU.
[ -z "$epochs" ] || [ -n "$max_steps" ] || user+=(--cpu-max-steps 0)

# --- what the mode needs
output=$test_dir/output/$device_id
if [ -n "$data" ]; then
    user+=(--data "$data")
elif [ "$mode" = performance ]; then
    user+=(--synthetic)
else
    fail 'para "data_path" must be config'
fi
case $mode in
eval | finetune)
    if [ -z "$resume" ] || [ "$resume" = auto ]; then
        resume=''
        for folder in "$output".prev-* "$output" "$bundle"; do # from the oldest to the one to prefer
            [ ! -f "$folder/model_best.pth.tar" ] || resume=$folder/model_best.pth.tar
        done
        [ -n "$resume" ] || fail "no model_best.pth.tar in $bundle: train first, or give --resume=FILE"
    fi
    [ -f "$resume" ] || fail "--resume: there is no file $resume"
    ;;
esac
# shellcheck disable=SC2046 # where the file does not name timm there is no such word
"$python" -c 'import importlib.util as i, sys; sys.exit(any(i.find_spec(n) is None for n in sys.argv[1:]))' \
    torch numpy PIL $(grep -o '^timm' "$bundle/requirements.txt") ||
    fail "torch, numpy, pillow or timm is missing for $python: pip install -r $bundle/requirements.txt"

# --- a fresh output folder; what an earlier run left is kept beside it
if [ -z "$dry_run" ]; then
    if ! mkdir -p "$test_dir/output" 2>/dev/null || [ ! -w "$test_dir/output" ]; then
        fail "$test_dir/output cannot be written"
    fi
    previous=''
    if [ -e "$output" ]; then
        previous=$output.prev-$(date +%Y%m%d-%H%M%S)
        while [ -e "$previous" ]; do previous+=x; done
        mv "$output" "$previous"
        [ "${resume#"$output"/}" = "$resume" ] || resume=$previous/${resume#"$output"/}
    fi
    mkdir "$output"
    # A bundle that keeps its checkpoints here goes on from them.
    if [ "$resume" = auto ] && [ -n "$previous" ]; then
        find "$previous" -maxdepth 1 -name '*.pth.tar' -exec mv {} "$output" ';'
    fi
fi
case $mode in
eval) user+=(--evaluate --resume "$resume") ;;
finetune) user+=(--pretrained "$resume") ;;
*) [ -z "$resume" ] || user+=(--resume "$resume") ;;
esac

# --- ranks
if [ "$rank_size" -gt 1 ]; then
    cards=$(seq -s, 0 $((rank_size - 1)))
    ranks=(--multiprocessing-distributed --device-list "$cards")
else
    ranks=(--device-list "$device_id")
fi
environment=$(env | sort)
# shellcheck source=common/npu_env.sh
source "$common/npu_env.sh"
command=("$python" -u "$bundle/main.py" "$@" --log-dir "$output" --log-id "$device_id" "${ranks[@]}" "${user[@]}")
if [ -n "$dry_run" ]; then
    printf 'command:\n  %s\n' "$(printf '%q ' "${command[@]}")"
    printf 'environment:\n'
    comm -13 <(printf '%s\n' "$environment") <(env | sort) | grep '' | sed 's/^/  /' || echo '  as it is'
    printf 'recipe on this machine:\n'
    exec "${command[@]}" --dry-run
fi

# --- run: everything goes to nohup.out, and to the screen; a signal goes to the ranks, which save and end
keep_alive() { # command: it ends after the ranks, also when a signal comes
    trap '' HUP INT TERM
    exec "$@"
}
: >"$output/nohup.out"
LIVE_TERMINAL=''
if [ -t 1 ] && { LIVE_TERMINAL=$(tty <&3); } 3>&1 && [ -w "$LIVE_TERMINAL" ] && [ "${TERM:-dumb}" != dumb ]; then
    export LIVE_TERMINAL # rank 0 writes its lines there, and one live line in place of those of the progress
    # shellcheck disable=SC2094 # nothing reads nohup.out
    exec 4>>"$output/nohup.out" 5> >(keep_alive tee -a "$output/nohup.out" > >(keep_alive sed -u $'s/^/\r\e[K/' >&2))
else
    exec 4> >(keep_alive tee -a "$output/nohup.out")
    exec 5>&4
fi
tee_pid=$!
pid='' signal=0
stop() { # exit status
    signal=$1
    [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true
}
trap 'stop 143' TERM
trap 'stop 130' INT
trap 'stop 129' HUP
STARTED_BY_SCRIPT=1 "${command[@]}" >&4 2>&5 &
pid=$!
[ "$signal" = 0 ] || stop "$signal" # it came before there was a pid
status=0
wait "$pid" || status=$?
while kill -0 "$pid" 2>/dev/null; do # a trapped signal ends `wait` early
    status=0
    wait "$pid" || status=$?
done
exec 4>&- 5>&-
wait "$tee_pid" 2>/dev/null || true
[ "$signal" = 0 ] || status=$signal
if [ "$status" != 0 ]; then
    [ -z "$LIVE_TERMINAL" ] || printf '\n' >&2 # below what is left of the live line
    tail -n 5 "$output/nohup.out" >&2
    printf '%s ended with status %s; all it said is in %s\n' "$name" "$status" "$output/nohup.out" |
        tee -a "$output/nohup.out" >&2
    exit "$status"
fi
PYTHONPATH=$common/.. "$python" -m common.parse_log "$output" --mode "$mode"
