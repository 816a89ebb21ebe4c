# shellcheck shell=bash
# Environment of an Ascend host, sourced by launch.sh. Without CANN it does nothing; what the user has set stays.

# CANN's own set_env.sh, where nobody has sourced it yet; the installer writes down where it has put CANN.
installed=$(sed -n 's/.*Install_Path.*=//p' /etc/Ascend/ascend_cann_install.info 2>/dev/null | head -n 1 || true)
for cann in "${ASCEND_TOOLKIT_HOME:-}" {"${installed:-/usr/local/Ascend}",/usr/local/Ascend,"${HOME:-}/Ascend"}/{cann,ascend-toolkit,nnae}; do
    if [ -n "$cann" ] && [ -f "$cann/set_env.sh" ] && [ -z "${ASCEND_HOME_PATH:-}" ]; then
        set +u # it reads variables that may not exist
        # shellcheck disable=SC1091
        source "$cann/set_env.sh" || printf '[Warning] %s/set_env.sh ended with status %s\n' "$cann" "$?" >&2
        set -u
    fi
done
if [ -n "${ASCEND_HOME_PATH:-}" ]; then
    [[ " ${user[*]-} " != *" --compile"* ]] || queue=1                     # graphs are not recorded from a second thread
    export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE-${queue-2}}"             # launch kernels from a second thread
    export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT-1200}"             # ranks may start minutes apart; distributed.py: 40
    export HCCL_IF_BASE_PORT="${HCCL_IF_BASE_PORT-29700}"                  # and 31 more, none of which Linux gives to others
    export ASCEND_SLOG_PRINT_TO_STDOUT="${ASCEND_SLOG_PRINT_TO_STDOUT-0}"  # CANN's own log goes to its files
    export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL-3}"          # errors only: lower levels slow every call
    export ASCEND_GLOBAL_EVENT_ENABLE="${ASCEND_GLOBAL_EVENT_ENABLE-0}"    # no event log either
fi
# Left alone on purpose: the allocator (all shapes are fixed: nothing fragments), HCCL_EXEC_TIMEOUT (no rank works alone for
# long), COMBINED_ENABLE (may copy more), CPU_AFFINITY_CONF (spawn in distributed.py knows the cards).
