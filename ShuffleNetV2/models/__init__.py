"""The plain networks, and in `CHANNEL_SHUFFLE` the modules that have each form of them under the same names."""

from . import shufflenetv2, shufflenetv2_wock_op_woct
from .shufflenetv2 import shufflenet_v2_x0_5, shufflenet_v2_x1_0, shufflenet_v2_x1_5, shufflenet_v2_x2_0

__all__ = ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"]

# Form of the channel shuffle to module: getattr(CHANNEL_SHUFFLE["wock"], "shufflenet_v2_x1_0")(num_classes=1000)
CHANNEL_SHUFFLE = {"plain": shufflenetv2, "wock": shufflenetv2_wock_op_woct}
