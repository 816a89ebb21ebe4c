#!/usr/bin/env bash
# Everything mechanical about the 40 scripts: options, output folder, ranks, result files, exit status.
#   launch.sh SCRIPT [option of the user ...] -- [flag of the recipe ...]
# Mode and number of cards come from the script's name (train_<mode>_<n>p.sh), the network from its folder.
started=$(date +%s.%N) # E2ETrainingTime counts from here
set -euo pipefail
unset CDPATH data resume epochs max_steps previous kept queue # which the user may have exported

common=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
script=$1
test_dir=$(cd "$(dirname "$script")" && pwd -P)
bundle=$(dirname "$test_dir")
[[ $script =~ train_([a-z]+)_([0-9]+)p\.sh$ ]]
mode=${BASH_REMATCH[1]} rank_size=${BASH_REMATCH[2]}
shift

fail() { # message, exit status
    printf '[Error] %s\n' "$1" >&2
    exit "${2:-1}"
}

usage() { # all that was given: options of the user -- flags of the recipe
    local given=" $*"
    printf 'usage: bash %s [option ...]\n\n' "$script"
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    cat <<END

  --data_path=DIR       folder with train/ and val/; without it only performance runs, on synthetic images
  --device=npu|gpu|cpu  default: an NPU if there is one, else CUDA, else the CPU
  --device_id=N         card of a 1p run, and name of its output folder (default: $device_id)
  --rank_size=N         number of cards (default: $rank_size)
  --batch_size=N        images per card and step
  --workers=N           decoding processes per card (default: the cores, shared)
  --epochs=N --max_steps=N --learning_rate=X   passes over train/; end after N steps; --lr of main.py
  --resume=FILE         full: go on from it; eval, finetune: the weights (default: the newest model_best.pth.tar)
  --output_dir=DIR      where the checkpoints go
  --dry-run, --help     print command, environment and recipe; print this

flags of the recipe: ${given#* -- }
More flags may follow, and win over the recipe: python3 $bundle/main.py --help
END
}

# --- options: those of the script become flags of main.py, all others go there as they are; it refuses what is wrong
node='' log_dir='' device_id=${ASCEND_DEVICE_ID:-0} dry_run='' is_run=yes user=()
while [ "$1" != -- ]; do
    option=${1%%=*} value=${1#*=} taken=1
    [[ $1 == *=* ]] || value=$2 taken=2
    case $option in
    --help | -h) usage "$@" && exit || exit ;; # the reader of a pipe may have ended
    --dry-run) dry_run=yes taken=1 ;;
    --check | --export | --predict) is_run='' user+=("$1") taken=1 ;;
    --data_path | --data-path | --data) data=$value ;;
    --device_id) device_id=$value ;;
    --rank_size) rank_size=$value ;;
    --rank) user+=(--rank "$value") && [ "$value" = 0 ] || node=_node$value ;; # nodes may share this folder
    --log-dir) log_dir=$value user+=(--log-dir "$value") ;;
    --resume) [ -f "$value" ] && resume=$(realpath "$value") || resume=$value ;;
    --batch_size | --batch-size | -b) user+=(--batch-size "$value" --cpu-batch-size "$value") ;;
    --epochs | --epoch) epochs=$value user+=(--epochs "$value") ;;
    --learning_rate) user+=(--lr "$value") ;;
    --max_steps | --max-steps | --max_step) max_steps=$value user+=(--max-steps "$value" --cpu-max-steps "$value") ;;
    *) user+=("$1") taken=1 ;;
    esac
    [[ $taken = 1 || $2 != -- ]] || fail "$option needs a value" 2
    shift "$taken"
done
shift # what is left is the recipe
[[ $rank_size =~ ^[1-9][0-9]{0,3}$ ]] || fail "--rank_size=$rank_size is not a number of cards" 2
[[ $device_id =~ ^[0-9]{1,4}$ ]] || fail "--device_id=$device_id is not the number of a card" 2
[ "$rank_size" = 1 ] || [ "${RANK+r}${LOCAL_RANK+l}${WORLD_SIZE+w}" != rlw ] ||
    fail 'RANK, LOCAL_RANK and WORLD_SIZE are set, as torchrun does: unset them, this script starts its ranks itself' 2
[ "${RANK_SIZE:-$rank_size}" = "$rank_size" ] || # images of other frameworks export it for good
    printf 'RANK_SIZE=%s is not used, the cards are %s: --rank_size changes that\n' "$RANK_SIZE" "$rank_size" >&2
[ -z "${epochs+given}" ] || [ -n "${max_steps+given}" ] || user+=(--max-steps 0 --cpu-max-steps 0) # whole epochs
[ -n "${data-}" ] || [ "$mode" = performance ] || fail 'para "data_path" must be config'
[ -n "${data+given}" ] && user+=(--data "$data") || user+=(--synthetic)
output=$test_dir/output/$device_id$node uses=(--resume)
[ "$mode" != eval ] || uses=(--evaluate --resume)
[ "$mode" != finetune ] || uses=(--pretrained)
if [[ $mode =~ eval|finetune && ${resume-auto} = auto ]]; then
    resume=$bundle/model_best.pth.tar
    for folder in "$output".prev-* "$output" "$bundle"; do # from the oldest to the one to prefer
        [ ! -f "$folder/model_best.pth.tar" ] || resume=$folder/model_best.pth.tar
    done
    [ -f "$resume" ] || [ -n "$dry_run" ] || fail "no model_best.pth.tar in $bundle: train first, or give --resume=FILE"
fi
# An evaluation leaves the output of a training where it is.
if [ "$mode" = eval ] && { compgen -G "$output/*.pth.tar" || grep -s '^Epoch: \[' "$output"/train_*.log; } >/dev/null; then
    output+=_eval
fi
ranks=(--device-list "$device_id")
[ "$rank_size" = 1 ] || ranks=(--multiprocessing-distributed --device-list "$(seq -s, 0 $((rank_size - 1)))")
environment=$(env | sort) python=${PYTHON:-python3}
# shellcheck source=common/npu_env.sh
source "$common/npu_env.sh"
command=("$python" -u "$bundle/main.py" "$@" --log-dir "${output/"$node"/}" --log-id "$device_id" "${ranks[@]}" "${user[@]}")
[ -z "${resume+given}" ] || command+=("${uses[@]}" "$resume")
if [ -n "$dry_run" ]; then
    printf 'command:\n  %s\nenvironment:\n' "$(printf '%q ' "${command[@]}")"
    comm -13 <(printf '%s\n' "$environment") <(env | sort) | grep '' | sed 's/^/  /' || echo '  as it is'
    printf 'recipe on this machine:\n'
    exec "${command[@]}" --dry-run
fi

# --- main.py refuses what is wrong before anything is touched
pid='' signal=0 status=''
stop() { # exit status
    signal=$1
    [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
said=$("${command[@]}" --check 2>&1) || status=$?
[ "$signal" = 0 ] || exit "$signal"
[ -z "$status" ] || { printf '%s\n' "$said" >&2 && exit "$status"; }

# --- a fresh output folder; what an earlier run left is kept beside it
{ mkdir -p "$test_dir/output" && [ -w "$test_dir/output" ]; } 2>/dev/null || fail "$test_dir/output cannot be written"
if [ -e "$output" ]; then # a run that was killed a moment ago may hold it a little longer
    flock -w 5 -E 75 "$output/nohup.out" true 2>/dev/null || [ $? != 75 ] ||
        fail "another run writes to $output: give this one another --device_id"
    [ "$signal" = 0 ] || exit "$signal"
    previous=$output.prev-$(date +%Y%m%d-%H%M%S)
    while [ -e "$previous" ]; do previous+=x; done
    mv "$output" "$previous"
    command=("${command[@]/#"$output/"/"$previous/"}") # --resume test/output/0/checkpoint.pth.tar
fi
mkdir "$output"
if [ "$mode" = full ] && [ -n "${resume-}" ] && [ -n "$is_run" ]; then # what a run needs that goes on, from the last one that saves
    previous=$(grep -ls '"evaluate": false.*"no_save": false' "$output".prev-*/metrics.jsonl | tail -n 1 || true)
    [ "$resume" != auto ] || kept=$(compgen -G "$output.prev-*/*.pth.tar" | sort | tail -n 1 || true)
    [ -z "${kept-}" ] || previous=${kept%/*}/metrics.jsonl # where the checkpoints are; a run that failed may have none
    [ ! -f "$previous" ] || cp -p "$previous" "$output"
    [ -z "${kept-}" ] || find "${kept%/*}" -maxdepth 1 -name '*.pth.tar' -exec mv {} "$output" ';'
fi

# --- run: everything goes to nohup.out, and to the screen; a signal goes to the ranks, which save and end
exec 6>"$output/nohup.out"
flock -n 6 2>/dev/null || true # until its last process has ended; some file systems have no locks
clear=''
if [ -t 1 ] && { LIVE_TERMINAL=$(tty <&3); } 3>&1 && [ -w "$LIVE_TERMINAL" ] && [ "${TERM:-dumb}" != dumb ]; then
    export LIVE_TERMINAL # rank 0 writes its lines there itself, above one that it renews
    clear=$'\r\e[K'      # what else there is takes the place of that one
fi
exec 5> >(trap '' HUP INT TERM PIPE && tee -a "$output/nohup.out" | sed -u "s/^/$clear/") 4>&5
tee_pid=$!
[ -z "$clear" ] || exec 4>>"$output/nohup.out"
SCRIPT_STARTED=$started PARENT_PID=$$ "${command[@]}" >&4 2>&5 &
pid=$!
[ "$signal" = 0 ] || stop "$signal" # it came before there was a pid
until [ -n "$status" ] && ! kill -0 "$pid" 2>/dev/null; do # a signal ends `wait` early
    wait "$pid" && status=0 || status=$?
done
exec 4>&- 5>&-
for _ in {1..50}; do kill -0 "$tee_pid" 2>/dev/null && sleep 0.1; done # no longer: a stray process may hold the pipe
[ "$signal" = 0 ] || status=$signal
if [ "$status" != 0 ]; then
    echo "$(basename "$script" .sh) ended with status $status; all it said is in $output/nohup.out" | tee -a "$output/nohup.out" >&2
    exit "$status"
fi
[ -n "$is_run" ] || exit 0 # it leaves no results
output=${log_dir:-$output}
[ -f "$output/metrics.jsonl" ] || { echo 'the log and the results are on node 0' && exit; }
PYTHONPATH=$common/..${PYTHONPATH:+:$PYTHONPATH} "$python" -m common.parse_log "$output" --mode "$mode"
