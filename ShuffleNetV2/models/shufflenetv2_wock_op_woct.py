"""ShuffleNetV2 without chunk, split, transpose and permute: same parameters, outputs and gradients.

Those leave tensors that are not contiguous, which Ascend's kernels first have to copy. Here slices take the halves, and
stacking the branches on a new axis after the channels shuffles them in the one copy that concatenating costs anyway.
A gather (`index_select`) would do as well, but is slower, and its gradient is a scatter-add.
"""

import torch

from . import shufflenetv2

__all__ = ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"]


class InvertedResidual(shufflenetv2.InvertedResidual):
    def halves(self, x):
        return x[:, : self.half], x[:, self.half :]

    def shuffle(self, kept, new):
        return torch.stack((kept, new), 2).flatten(1, 2)


class ShuffleNetV2(shufflenetv2.ShuffleNetV2):
    block = InvertedResidual


def shufflenet_v2_x0_5(num_classes=1000):
    """Build ShuffleNetV2 0.5x in this form; see `shufflenetv2.shufflenet_v2_x0_5`."""
    return ShuffleNetV2((48, 96, 192, 1024), num_classes)


def shufflenet_v2_x1_0(num_classes=1000):
    """Build ShuffleNetV2 1.0x in this form; see `shufflenetv2.shufflenet_v2_x0_5`."""
    return ShuffleNetV2((116, 232, 464, 1024), num_classes)


def shufflenet_v2_x1_5(num_classes=1000):
    """Build ShuffleNetV2 1.5x in this form; see `shufflenetv2.shufflenet_v2_x0_5`."""
    return ShuffleNetV2((176, 352, 704, 1024), num_classes)


def shufflenet_v2_x2_0(num_classes=1000):
    """Build ShuffleNetV2 2.0x in this form; see `shufflenetv2.shufflenet_v2_x0_5`."""
    return ShuffleNetV2((244, 488, 976, 2048), num_classes)
