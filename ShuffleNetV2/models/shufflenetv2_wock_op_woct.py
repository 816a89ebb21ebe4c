"""ShuffleNetV2 without chunk, split, transpose and permute: same parameters, outputs and gradients.

Those leave tensors that are not contiguous, which Ascend's kernels first have to copy. Here slices take the halves, and
stacking the branches on a new axis after the channels shuffles them in the one copy that concatenating costs anyway.
A gather (`index_select`) would do as well, but is slower, and its gradient is a scatter-add.

Images in channels_last memory, as on CPU and CUDA, stay in it: there one copy shuffles too, on the last axis, and
chunk's gradient is one copy, where that of two slices takes five.
"""

import torch

from . import shufflenetv2

__all__ = ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"]


def _in_channels_last(x):
    """Tell whether `x` is a tensor in that memory; what torch.fx traces with is none."""
    return isinstance(x, torch.Tensor) and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class InvertedResidual(shufflenetv2.InvertedResidual):
    def halves(self, x):
        if _in_channels_last(x):
            return x.chunk(2, 1)
        return x[:, : self.half], x[:, self.half :]

    def shuffle(self, kept, new):
        if _in_channels_last(new):
            pixels = [branch.permute(0, 2, 3, 1) for branch in (kept, new)]
            return torch.stack(pixels, 4).flatten(3).permute(0, 3, 1, 2)
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
