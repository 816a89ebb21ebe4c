"""Depthwise and 1x1 convolutions for training on a CPU in bfloat16, in plain torch, faster than oneDNN's."""

import torch
from torch.nn import functional as F


def convert_layers(model):
    """Return `model` with faster convolutions in place of those that have a faster form.

    As with `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, names and keys of the state_dict stay; parameters and hooks
    are the same objects.
    """
    kind = _faster_kind(model)
    if kind is not None:
        layer, model = model, kind.__new__(kind)
        vars(model).update(vars(layer))
    for name, child in model.named_children():
        model.add_module(name, convert_layers(child))
    return model


def _faster_kind(layer):
    if type(layer) is not torch.nn.Conv2d:
        return None
    size, channels, padding = layer.kernel_size, layer.in_channels, layer.padding
    if size == (1, 1) and layer.groups == 1 and padding == (0, 0):
        return PointwiseConv2d
    is_depthwise = layer.groups == channels == layer.out_channels and layer.bias is None
    is_usual = size in ((3, 3), (5, 5), (7, 7)) and layer.stride in ((1, 1), (2, 2)) and layer.dilation == (1, 1)
    pads_zeros = layer.padding_mode == "zeros" and padding in [(n, n) for n in range(size[0])]
    return DepthwiseConv2d if is_depthwise and is_usual and pads_zeros else None


class DepthwiseConv2d(torch.nn.Conv2d):
    """A depthwise `Conv2d` with faster gradients under autocast; elsewhere it is torch's, digit for digit."""

    def forward(self, images):
        if not (torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return super().forward(images)
        dtype = torch.get_autocast_dtype("cpu")
        images, weight = images.to(dtype), self.weight.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return DepthwiseFunction.apply(images, weight, self.stride[0], self.padding[0])


class PointwiseConv2d(torch.nn.Conv2d):
    """A 1x1 `Conv2d` that is a matrix product where that is faster."""

    def forward(self, images):
        order = sorted((1, 2, 3), key=images.stride, reverse=True)  # of the axes in memory
        if order[-1] != 1 and order != [1, 2, 3] and self.stride == (1, 1):  # neither channels_last nor contiguous
            return self._mix(images, order)
        if self.in_channels < 100 or not torch.is_autocast_enabled("cpu"):  # the convolution is faster with few
            return super().forward(images)
        pixels = images[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def _mix(self, images, order):
        """Leave the memory in its order, also in float32, which the convolution does not (sMLPNet mixes rows so)."""
        axis, in_order = 1 + order.index(1), images.permute(0, *order)
        matrices = in_order.flatten(0, axis - 1).flatten(2)
        weight = self.weight.flatten(1).expand(len(matrices), -1, -1)  # torch.matmul would copy the matrices
        product = weight, matrices
        result = torch.bmm(*product) if self.bias is None else torch.baddbmm(self.bias[:, None], *product)
        result = result.view(*in_order.shape[:axis], self.out_channels, *in_order.shape[axis + 1 :])
        return result.permute(0, *(1 + order.index(axis) for axis in (1, 2, 3)))


class DepthwiseFunction(torch.autograd.Function):
    """A depthwise convolution of `images` [B, C, H, W] with `weight` [C, 1, K, K], K odd."""

    @staticmethod
    def forward(ctx, images, weight, stride, padding):
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        arguments = gradient, *ctx.saved_tensors, ctx.stride, ctx.padding
        images_gradient = _images_gradient(*arguments) if ctx.needs_input_grad[0] else None
        weight_gradient = _weight_gradient(*arguments) if ctx.needs_input_grad[1] else None
        return images_gradient, weight_gradient, None, None


def _images_gradient(gradient, images, weight, stride, padding):
    """Return it as a forward convolution with the flipped kernel; at stride 2, zeros are between the pixels."""
    inner = weight.shape[-1] - 1
    if stride > 1:
        height, width = (side + 2 * padding - inner for side in images.shape[2:])
        spread = gradient.new_zeros(len(gradient), height, width, len(weight)).permute(0, 3, 1, 2)
        spread[:, :, ::stride, ::stride] = gradient
        gradient = spread
    return F.conv2d(gradient, weight.flip(2, 3), padding=inner - padding, groups=len(weight))


def _weight_gradient(gradient, images, weight, stride, padding):
    """Return it from pieces of three columns: oneDNN is fast up to that width, where the map is no smaller."""
    kernel = weight.shape[-1]
    if kernel <= min(3, *images.shape[2:]):
        return _of_torch(gradient, images, weight, stride, [padding] * 2)
    result, width = torch.empty_like(weight), (gradient.shape[-1] - 1) * stride + 3
    for left in range(0, kernel - 2, 2):
        # The columns that the piece sees, filled up with zeros.
        part = F.pad(images, (padding - left, width + left - padding - images.shape[-1]))
        piece = weight[..., left : left + 3].contiguous()
        result[..., left : left + 3] = _of_torch(gradient, part, piece, stride, [padding, 0])
    return result


def _of_torch(gradient, images, weight, stride, padding):
    options = [stride] * 2, padding, [1, 1], False, [0, 0], len(weight), [False, True, False]
    return torch.ops.aten.convolution_backward(gradient, images, weight, None, *options)[1]
