"""ShuffleNetV2 without chunk, split, transpose and permute: same parameters, outputs and gradients.

Those leave tensors that are not contiguous, which Ascend's kernels first have to copy. Here slices take the halves, and
stacking the branches on a new axis after the channels shuffles them in the one copy that concatenating costs anyway.
A gather (`index_select`) would do as well, but is slower, and its gradient is a scatter-add.

Images in channels_last memory, as on CPU and CUDA, stay in it: there one copy shuffles too, on the last axis.
"""

import torch

from . import shufflenetv2

__all__ = ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"]


def _in_channels_last(x):
    """Tell whether `x` is a tensor in that memory; what torch.fx traces with is none."""
    return isinstance(x, torch.Tensor) and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class Halves(torch.autograd.Function):
    """The channels of `x` before and from number `half` on: slices, whose own gradients would be padded and added."""

    @staticmethod
    def forward(ctx, x, half):
        return x[:, :half], x[:, half:]

    @staticmethod
    def backward(ctx, *gradients):
        return torch.cat(gradients, 1), None


class Interleave(torch.autograd.Function):
    """The channels of `kept` and `new` [N, C, H, W] in turn, all in channels_last memory, as are their gradients.

    Those of `torch.stack` would be every second number of a larger tensor, which other layers read ten times slower.
    """

    @staticmethod
    def forward(ctx, kept, new):
        kept, new = kept.permute(0, 2, 3, 1), new.permute(0, 2, 3, 1)
        pixels = kept.new_empty(*kept.shape, 2)
        pixels[..., 0], pixels[..., 1] = kept, new
        return pixels.flatten(3).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        pixels = gradient.permute(0, 2, 3, 1)
        pairs = pixels.reshape(*pixels.shape[:3], -1, 2).permute(4, 0, 1, 2, 3).contiguous()
        return tuple(branch.permute(0, 3, 1, 2) for branch in pairs)


class InvertedResidual(shufflenetv2.InvertedResidual):
    def halves(self, x):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            return Halves.apply(x, self.half)
        return x[:, : self.half], x[:, self.half :]

    def shuffle(self, kept, new):
        if _in_channels_last(new):
            return Interleave.apply(kept, new)
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
