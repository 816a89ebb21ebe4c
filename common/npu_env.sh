# shellcheck shell=bash
# Environment of an Ascend host, sourced by launch.sh. Without CANN it does nothing; what the user has set stays.

# CANN's own set_env.sh, where nobody has sourced it yet (the old env_npu.sh of ModelZoo did the same).
for cann in "${ASCEND_TOOLKIT_HOME:-}" /usr/local/Ascend/cann /usr/local/Ascend/ascend-toolkit; do
    if [ -n "$cann" ] && [ -f "$cann/set_env.sh" ] && [ -z "${ASCEND_HOME_PATH:-}" ]; then
        set +u # it reads variables that may not exist
        # shellcheck disable=SC1091
        source "$cann/set_env.sh" || printf '[Warning] %s/set_env.sh ended with status %s\n' "$cann" "$?" >&2
        set -u
    fi
done

npu_default() { # name, value
    [ -n "${!1+set}" ] || export "$1=$2"
}
if [ -n "${ASCEND_HOME_PATH:-}" ]; then
    npu_default TASK_QUEUE_ENABLE 2            # launch kernels from a second thread: small networks wait for the host
    npu_default CPU_AFFINITY_CONF 1            # keep each rank's threads on the cores near its card
    npu_default HCCL_CONNECT_TIMEOUT 1200      # ranks may start minutes apart (slow disks); less than the 40 minutes of common/distributed.py
    npu_default ASCEND_SLOG_PRINT_TO_STDOUT 0  # CANN's own log goes to its files
    npu_default ASCEND_GLOBAL_LOG_LEVEL 3      # errors only: lower levels slow every call
    npu_default ASCEND_GLOBAL_EVENT_ENABLE 0   # no event log either
fi
# Left alone on purpose: the allocator (all shapes are fixed: nothing fragments), HCCL_EXEC_TIMEOUT (no rank works alone for
# long), COMBINED_ENABLE (may copy more). Gone with torch 1.5: PTCOPY_ENABLE, DYNAMIC_OP, TRI_COMBINED_ENABLE,
# SCALAR_TO_HOST_MEM, which nothing reads; HCCL_WHITELIST_DISABLE=1 is CANN's default.
