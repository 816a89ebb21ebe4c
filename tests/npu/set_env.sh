# shellcheck shell=bash
# What CANN's own set_env.sh does, for the fake one: `source tests/npu/build/cann/set_env.sh`.
ASCEND_HOME_PATH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export ASCEND_HOME_PATH ASCEND_TOOLKIT_HOME=$ASCEND_HOME_PATH ASCEND_OPP_PATH=$ASCEND_HOME_PATH/opp
export LD_LIBRARY_PATH=$ASCEND_HOME_PATH/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$ASCEND_HOME_PATH/python${PYTHONPATH:+:$PYTHONPATH}
export TASK_QUEUE_ENABLE=0              # the fake has no queue: every call is synchronous
export TORCH_NPU_FALLBACK_CPU_DISABLE=1 # an operator that the card does not have is an error
