"""The layers that are our own on a CPU, and torch's, in the shapes of MnasNet and PNASNet."""

import torch
from torch import nn

from common import batchnorm, convolution, device
from tests.benchmark import measure

BATCH, ROUNDS, PASSES = 32, 5, 10  # passes in a round: the first one after a pause is slow
NORMS = ((32, 112), (48, 112), (72, 56), (240, 28), (480, 14), (1152, 7))  # channels, side
# Channels, side, kernel, stride.
DEPTHWISE = (
    (32, 112, 3, 1),
    (576, 14, 3, 2),
    (72, 56, 5, 2),
    (120, 28, 5, 1),
    (480, 14, 5, 1),
    (1152, 7, 5, 1),
    (108, 42, 7, 1),
)


def _in_memory(*shape, dtype):
    return torch.randn(BATCH, *shape).to(dtype).to(memory_format=torch.channels_last)


def norm(fast, channels, side):
    """Return a function that does both passes of BatchNorm and ReLU in bfloat16, ours where it is to be fast."""
    images, gradient = (_in_memory(channels, side, side, dtype=torch.bfloat16) for _ in range(2))
    images.requires_grad_()
    layers = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    device.keep_freed_memory()
    if fast:
        batchnorm.speed_up(layers)

    def run():
        for _ in range(PASSES):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = layers(images)
            torch.autograd.grad(result, [images, *layers.parameters()], gradient)

    return run


def depthwise(fast, channels, side, kernel, stride):
    """Return a function that does the backward pass of the convolution in float32, ours where it is to be fast."""
    images = _in_memory(channels, side, side, dtype=torch.float32).requires_grad_()
    layer = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    device.keep_freed_memory()
    if fast:
        convolution.speed_up(layer, torch.float32)
    result = layer(images)
    gradient = _in_memory(*result.shape[1:], dtype=torch.float32)

    def run():
        for _ in range(PASSES):
            torch.autograd.grad(result, [images, layer.weight], gradient, retain_graph=True)

    return run


def _compare(build, title, shapes, label):
    rows = []
    for shape in shapes:
        forms = {name: (build, name == "ours", *shape) for name in ("ours", "torch's")}
        turns = measure.in_turns(forms, ROUNDS)
        milliseconds = ["{:.2f}".format(1000 * turns[name].seconds / PASSES) for name in forms]
        faster_by = "{:.2f}".format(turns["torch's"].seconds / turns["ours"].seconds)
        rows.append([label.format(*shape), *milliseconds, faster_by])
    headers = ["{}, batch {}".format(title, BATCH), "ours, ms", "torch's, ms", "ours is faster by"]
    print(measure.table(headers, rows) + "\n", flush=True)


def run():
    """Print the tables."""
    _compare(norm, "BatchNorm and ReLU, bfloat16", NORMS, "{0} channels, {1}x{1}")
    label = "{0} channels, {1}x{1}, kernel {2}x{2}, stride {3}"
    _compare(depthwise, "gradients of a depthwise convolution, float32", DEPTHWISE, label)
