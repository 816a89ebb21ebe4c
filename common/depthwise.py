"""Faster gradients of large depthwise convolutions in bfloat16 on a CPU.

oneDNN has a fast kernel for the weight gradient of a 3x3 depthwise convolution and a slow one for larger kernels. So a
5x5 gradient is put together from four 3x3 ones, each at its own offset of the padded input, a 7x7 one from nine. The
input gradient at stride 1 is a convolution with the flipped kernel; at stride 2 it is computed in float32.
"""

import torch
from torch.nn import functional as F


def _convolution_backward(gradient, images, weight, stride, padding, wanted):
    groups = weight.shape[0]
    return torch.ops.aten.convolution_backward(
        gradient, images, weight, None, stride, padding, [1, 1], False, [0, 0], groups, wanted
    )


def _weight_gradient(gradient, images, weight, stride, padding):
    """Return the gradient of `weight` [C, 1, K, K], K odd, from 3x3 pieces that may overlap."""
    kernel = weight.shape[-1]
    padded = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    height, width = ((size - 1) * step + 3 for size, step in zip(gradient.shape[2:], stride))
    result = torch.empty_like(weight)
    piece = weight[:, :, :3, :3].contiguous()
    for top in range(0, kernel - 2, 2):
        for left in range(0, kernel - 2, 2):
            part = padded[:, :, top : top + height, left : left + width]
            part = part.contiguous(memory_format=torch.channels_last)
            wanted = [False, True, False]
            result[:, :, top : top + 3, left : left + 3] = _convolution_backward(
                gradient, part, piece, stride, [0, 0], wanted
            )[1]
    return result


def _images_gradient(gradient, images, weight, stride, padding):
    """Return the gradient of `images` [B, C, H, W]."""
    if stride == (1, 1):
        outer = [weight.shape[-1] - 1 - amount for amount in padding]
        return F.conv2d(gradient, weight.flip(2, 3), padding=outer, groups=weight.shape[0])
    wanted = [True, False, False]
    whole = _convolution_backward(gradient.float(), images.float(), weight.float(), stride, padding, wanted)[0]
    return whole.to(images.dtype)


class _DepthwiseFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, stride, padding):
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, None, stride, padding, groups=weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        images, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        arguments = gradient, images, weight, ctx.stride, ctx.padding
        images_gradient = _images_gradient(*arguments) if ctx.needs_input_grad[0] else None
        weight_gradient = _weight_gradient(*arguments) if ctx.needs_input_grad[1] else None
        return images_gradient, weight_gradient, None, None


class DepthwiseConv2d(torch.nn.Conv2d):
    """A depthwise `Conv2d` whose gradients in bfloat16 come from the functions above; otherwise torch's own."""

    def forward(self, images):
        if not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
            return super().forward(images)
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return _DepthwiseFunction.apply(images.to(dtype), self.weight.to(dtype), self.stride, self.padding)


def speed_up(model):
    """Give the model's large depthwise convolutions their faster gradients; returns how many there were."""
    count = 0
    if not hasattr(torch, "get_autocast_dtype"):  # nor can a torch this old train in bfloat16 as fast
        return count
    for module in model.modules():
        if (
            type(module) is torch.nn.Conv2d
            and module.groups == module.in_channels == module.out_channels
            and module.kernel_size in ((5, 5), (7, 7))
            and module.stride in ((1, 1), (2, 2))
            and module.bias is None
        ):
            module.__class__ = DepthwiseConv2d
            count += 1
    return count
