# shellcheck shell=bash
# Environment of an Ascend host, sourced by launch.sh. Without CANN it does nothing; what the user has set stays.

for cann in "${ASCEND_TOOLKIT_HOME:-}" /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit; do
    if [ -n "$cann" ] && [ -f "$cann/set_env.sh" ] && [ -z "${ASCEND_HOME_PATH:-}" ]; then
        set +u # CANN's file reads variables that may not exist
        # shellcheck disable=SC1091
        source "$cann/set_env.sh"
        set -u
    fi
done

if [ -n "${ASCEND_HOME_PATH:-}" ]; then
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}                 # launch kernels from a second thread: small networks wait for the host
    export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}                 # keep each rank's threads on the cores near its card
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800}        # ranks may start minutes apart: first compilation, slow disks
    export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0} # CANN's own log goes to its files
    export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}     # errors only: lower levels slow every call
fi
