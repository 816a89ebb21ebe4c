"""Faster convolutions for training on a CPU, where oneDNN is slow: depthwise gradients and 1x1.

Depthwise in float32: both gradients come from `depthwise.c`, compiled at first use.

Depthwise in bfloat16: oneDNN has fast weight gradients for kernels up to three columns wide that are no larger than the
map. Wider ones are put together from pieces of three columns, each at its own offset of the padded input. The input
gradient is a forward convolution with the flipped kernel; at stride 2 zeros are put between the gradient's pixels.

1x1 in bfloat16: a matrix product of pixels and channels, faster where the channels are not few.

1x1 where the axis that is mixed is not the last in memory (sMLPNet mixes rows and columns so): a matrix product that
leaves the memory in its order; the convolution copies it into its own and back.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common.compiled import call, library

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


def compiled():
    """Return `depthwise.c` compiled, or None where it cannot be compiled."""
    return library("depthwise", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


class _FloatDepthwiseFunction(_DepthwiseFunction):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        images, weight = ctx.saved_tensors
        images, gradient = (item.contiguous(memory_format=torch.channels_last) for item in (images, gradient))
        (batch, channels, *size), kernel = images.shape, weight.shape[-1]
        of_images, of_weight = torch.empty_like(images), weight.new_zeros(batch, kernel * kernel, channels)
        tensors = images, gradient, weight.flatten(1).t().contiguous(), of_images, of_weight
        numbers = batch, *size, channels, *gradient.shape[2:], ctx.padding[0], kernel, ctx.stride[0]
        call(compiled().backward, tensors, *numbers)
        return of_images, of_weight.sum(0).t().reshape(weight.shape), None, None


class FloatDepthwiseConv2d(torch.nn.Conv2d):
    """A depthwise `Conv2d` with the gradients of `depthwise.c` in float32."""

    def forward(self, images):
        usable = torch.is_grad_enabled() and images.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not usable or torch.compiler.is_compiling():
            return super().forward(images)
        return _FloatDepthwiseFunction.apply(images, self.weight, self.stride, self.padding)


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
    """A 1x1 `Conv2d` that is a matrix product where that is faster."""

    def forward(self, images):
        order = sorted((1, 2, 3), key=images.stride, reverse=True)  # of the axes in memory
        if order[-1] != 1 and order != [1, 2, 3] and self.stride == (1, 1):  # neither channels_last nor contiguous
            return self._mix(images, order)
        if self.in_channels < FEW_CHANNELS or not torch.is_autocast_enabled("cpu"):
            return super().forward(images)
        pixels = images[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def _mix(self, images, order):
        inner = 2 - order.index(1)  # how many axes are behind the mixed one in memory
        in_order = images.permute(0, *order)
        shape = in_order.shape
        matrices = in_order.reshape(-1, shape[-1 - inner], shape[-inner:].numel())
        weight = self.weight.flatten(1).expand(len(matrices), -1, -1)  # torch.matmul would copy the matrices
        if self.bias is None:
            result = torch.bmm(weight, matrices)
        else:
            result = torch.baddbmm(self.bias.unsqueeze(1), weight, matrices)
        result = result.view(*shape[: -1 - inner], self.out_channels, *shape[-inner:])
        return result.permute(0, *(1 + order.index(axis) for axis in (1, 2, 3)))


def speed_up(model, dtype):
    """Give the model's convolutions their faster forms for training in `dtype`; return how many there were."""
    count = 0
    for module in model.modules():
        kind = _faster_form(module, dtype) if type(module) is torch.nn.Conv2d else None
        if kind is not None:
            module.__class__ = kind
            count += 1
    return count


def _faster_form(layer, dtype):
    size, channels = layer.kernel_size, layer.in_channels
    if (
        layer.groups == channels == layer.out_channels
        and size in ((3, 3), (5, 5), (7, 7))
        and layer.stride in ((1, 1), (2, 2))
        and layer.dilation == (1, 1)
        and layer.padding[0] == layer.padding[1]
        and layer.bias is None
    ):
        if dtype == torch.bfloat16:
            return DepthwiseConv2d
        return FloatDepthwiseConv2d if compiled() else None
    return PointwiseConv2d if size == (1, 1) and layer.groups == 1 and layer.padding == (0, 0) else None
