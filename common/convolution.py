"""Faster convolutions for training on a CPU in bfloat16: depthwise gradients and 1x1, where oneDNN is slow.

Depthwise: oneDNN has fast weight gradients for kernels up to three columns wide that are no larger than the map. Wider
ones are put together from pieces of three columns, each at its own offset of the padded input. The input gradient is
a forward convolution with the flipped kernel; at stride 2 zeros are put between the gradient's pixels.

1x1: a matrix product of pixels and channels, 1.2 to 8 times as fast where the channels are not few.
"""

import torch
from torch.nn import functional as F

FEW_CHANNELS = 100  # below, a 1x1 convolution is faster than the product


def _convolution_backward(gradient, images, weight, stride, padding, wanted):
    groups = weight.shape[0]
    return torch.ops.aten.convolution_backward(
        gradient, images, weight, None, stride, padding, [1, 1], False, [0, 0], groups, wanted
    )


def _weight_gradient(gradient, images, weight, stride, padding):
    """Return the gradient of `weight` [C, 1, K, K], K odd, from pieces [C, 1, K, 3] that may overlap.

    The padded input has zeros only at the left of each row: those of the next row, which follow in memory, serve at
    the right. So the input of each piece is the same memory from another pixel on, and nothing is copied for it.
    """
    kernel = weight.shape[-1]
    (batch, channels, height, width), (_, _, _, out_width) = images.shape, gradient.shape
    rows, columns = height + 2 * padding[0], max(width + padding[1], (out_width - 1) * stride[1] + 3)
    count = batch * rows * columns * channels
    memory = images.new_zeros(count + (kernel - 3) * channels)
    padded = memory[:count].view(batch, rows, columns, channels)
    padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = images.permute(0, 2, 3, 1)
    too_wide = (columns - 3) // stride[1] + 1 - out_width
    if too_wide:
        gradient = F.pad(gradient, (0, too_wide))
    result, piece = torch.empty_like(weight), weight[..., :3].contiguous()
    for left in range(0, kernel - 2, 2):
        part = memory[left * channels :][:count].view(batch, rows, columns, channels).permute(0, 3, 1, 2)
        gradients = _convolution_backward(gradient, part, piece, stride, [0, 0], [False, True, False])
        result[..., left : left + 3] = gradients[1]
    return result


def _images_gradient(gradient, images, weight, stride, padding):
    """Return the gradient of `images` [B, C, H, W]."""
    inner = weight.shape[-1] - 1
    if stride != (1, 1):
        height, width = (side + 2 * amount - inner for side, amount in zip(images.shape[2:], padding))
        spread = gradient.new_zeros(gradient.shape[0], height, width, gradient.shape[1]).permute(0, 3, 1, 2)
        spread[:, :, :: stride[0], :: stride[1]] = gradient
        gradient = spread
    outer = [inner - amount for amount in padding]
    return F.conv2d(gradient, weight.flip(2, 3), padding=outer, groups=weight.shape[0])


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
        images_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            images_gradient = _images_gradient(*arguments)
        if ctx.needs_input_grad[1]:
            if weight.shape[-1] > min(3, *images.shape[2:]):
                weight_gradient = _weight_gradient(*arguments)
            else:
                weight_gradient = _convolution_backward(*arguments, [False, True, False])[1]
        return images_gradient, weight_gradient, None, None


class DepthwiseConv2d(torch.nn.Conv2d):
    """A depthwise `Conv2d` with the gradients above in bfloat16; in float32 it stays torch's, digit for digit."""

    def forward(self, images):
        if not (torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return super().forward(images)
        dtype = torch.get_autocast_dtype("cpu")
        images, weight = images.to(dtype), self.weight.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _DepthwiseFunction.apply(images, weight, self.stride, self.padding)


class PointwiseConv2d(torch.nn.Conv2d):
    """A 1x1 `Conv2d` that is a matrix product in bfloat16."""

    def forward(self, images):
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(images)
        pixels = images[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def speed_up(model):
    """Give the model's depthwise and 1x1 convolutions their faster forms; returns how many there were."""
    count = 0
    for module in model.modules():
        if type(module) is not torch.nn.Conv2d:
            continue
        size, channels = module.kernel_size, module.in_channels
        if (
            module.groups == channels == module.out_channels
            and size in ((3, 3), (5, 5), (7, 7))
            and module.stride in ((1, 1), (2, 2))
            and module.dilation == (1, 1)
            and module.bias is None
        ):
            module.__class__ = DepthwiseConv2d
        elif size == (1, 1) and module.groups == 1 and module.padding == (0, 0) and channels >= FEW_CHANNELS:
            module.__class__ = PointwiseConv2d
        else:
            continue
        count += 1
    return count
