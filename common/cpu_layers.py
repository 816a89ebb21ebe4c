"""Layers for mixed precision in plain torch: convolutions and BatchNorm on a CPU, 1x1 along rows or columns on CUDA."""

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

TOGETHER = 16  # pixels: so many times the channels fill whole cache lines, in which threads do not meet


def convert_layers(model, device="cpu"):
    """Return `model` with faster layers for `device`; parameters, hooks and state_dict keys stay."""
    kind = _faster_kind(model, device)
    if kind is not None:
        layer, model = model, kind.__new__(kind)
        vars(model).update(vars(layer))
    for name, child in model.named_children():
        model.add_module(name, convert_layers(child, device))
    return model


def _faster_kind(layer, device):
    if not hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        return None
    if type(layer) is torch.nn.BatchNorm2d and device == "cpu":
        is_usual = layer.affine and layer.track_running_stats and layer.momentum is not None
        return BatchNorm2d if is_usual and layer.num_features % TOGETHER else None
    if type(layer) is not torch.nn.Conv2d:
        return None
    size, channels, padding = layer.kernel_size, layer.in_channels, layer.padding
    if size == (1, 1) and layer.groups == 1 and padding == (0, 0):
        return PointwiseConv2d
    is_depthwise = device == "cpu" and layer.groups == channels == layer.out_channels and layer.bias is None
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
    """A 1x1 `Conv2d` that is a matrix product where that is faster; its gradient has the weight's strides, for DDP."""

    def forward(self, images):
        order = sorted((1, 2, 3), key=images.stride, reverse=True)  # of the axes in memory
        if order[-1] != 1 and order != [1, 2, 3] and self.stride == (1, 1):  # neither channels_last nor contiguous
            return self._mix(images, order)
        if self.in_channels < 100 or not torch.is_autocast_enabled("cpu"):  # the convolution is faster with few
            return super().forward(images)
        pixels = images[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)

    def _mix(self, images, order):
        """Leave the memory in its order, also in float32, which the convolution does not (sMLPNet mixes rows so)."""
        axis, in_order = 1 + order.index(1), images.permute(0, *order)
        matrices = in_order.flatten(0, axis - 1).flatten(2)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1).expand(len(matrices), -1, -1)  # matmul would copy
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
        (images, weight), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        weight_gradient = _weight_gradient(gradient, images, weight, stride, padding)
        inner = weight.shape[-1] - 1
        if stride > 1:  # zeros between the pixels
            height, width = (side + 2 * padding - inner for side in images.shape[2:])
            spread = gradient.new_zeros(len(gradient), height, width, len(weight)).permute(0, 3, 1, 2)
            spread[:, :, ::stride, ::stride] = gradient
            gradient = spread
        # A forward convolution with the flipped kernel is faster than oneDNN's gradient of the images.
        images_gradient = F.conv2d(gradient, weight.flip(2, 3), padding=inner - padding, groups=len(weight))
        return images_gradient, weight_gradient, None, None


def _weight_gradient(gradient, images, weight, stride, padding):
    """Return it from pieces of three columns: oneDNN is fast up to that width, where the map is no smaller."""
    channels, _, kernel, _ = weight.shape
    if kernel <= min(3, *images.shape[2:]):
        return conv2d_weight(images, weight.shape, gradient, stride, padding, groups=channels)
    result, width = torch.empty_like(weight), (gradient.shape[-1] - 1) * stride + 3
    for left in range(0, kernel - 2, 2):
        # The columns that the piece sees, filled up with zeros.
        part = F.pad(images, (padding - left, width + left - padding - images.shape[-1]))
        piece = conv2d_weight(part, (channels, 1, kernel, 3), gradient, stride, (padding, 0), groups=channels)
        result[..., left : left + 3] = piece
    return result


class BatchNorm2d(torch.nn.BatchNorm2d):
    """A `BatchNorm2d` that is as fast with any number of channels, in training under autocast.

    torch keeps the sums of a thread beside those of the next: where the channels fill no whole cache lines, the threads
    wait for each other at every pixel. So several pixels count as one with as many times the channels.
    """

    def forward(self, images):
        pixels = images.numel() // self.num_features
        is_large = pixels >= 2**14 and pixels % TOGETHER == 0  # with fewer it takes longer
        is_autocast = torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        in_order = images.is_contiguous(memory_format=torch.channels_last)
        if not (self.training and is_autocast and is_large and in_order):
            return super().forward(images)
        result, mean, variance = BatchNormFunction.apply(images, self.weight, self.bias, self.eps)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * pixels / (pixels - 1), self.momentum)
        return result


class BatchNormFunction(torch.autograd.Function):
    """Return `images` [B, C, H, W] normalised, and the mean and biased variance of the channels."""

    @staticmethod
    def forward(ctx, images, weight, bias, eps):
        rows, shape = _rows(images)
        of_rows = torch.batch_norm_update_stats(rows, *torch.zeros(2, rows.shape[1]), 0.0)
        means, variances = torch.stack(of_rows).view(2, TOGETHER, -1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, unbiased=False)
        ctx.save_for_backward(images, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        result = F.batch_norm(rows, *_tiled(mean, variance, weight, bias), eps=eps).view(shape).permute(0, 3, 1, 2)
        return result.detach(), mean, variance  # a view could not be changed in place

    @staticmethod
    def backward(ctx, gradient, *_):
        images, weight, mean, variance = ctx.saved_tensors
        (rows, shape), (gradient, _) = _rows(images), _rows(gradient)
        needed = False, True, True  # the sums, which are the gradients of weight and bias
        options = *_tiled(weight, mean, variance), None, None, False, ctx.eps, needed
        sums = torch.ops.aten.native_batch_norm_backward(gradient, rows, *options)[1:]
        weight_gradient, bias_gradient = torch.stack(sums).view(2, TOGETHER, -1).sum(1)
        pixels = rows.numel() // len(mean)
        slope = (-weight * weight_gradient / (pixels * (variance + ctx.eps))).to(rows.dtype)
        factors = _tiled(bias_gradient / pixels, variance, weight, -slope * mean)
        result = F.batch_norm(gradient, *factors, eps=ctx.eps).addcmul_(rows, slope.repeat(TOGETHER))
        return result.view(shape).permute(0, 3, 1, 2), weight_gradient, bias_gradient, None


def _rows(images):
    pixels = images.permute(0, 2, 3, 1)
    return pixels.reshape(-1, TOGETHER * images.shape[1]), pixels.shape


def _tiled(*values):
    return torch.stack(values).repeat(1, TOGETHER)
