"""Forward and backward of BatchNorm and ReLU in bfloat16, in MnasNet's shapes: ours and torch's."""

import torch
from torch import nn

from common import batchnorm, device
from tests.benchmark import measure

BATCH, ROUNDS = 32, 15
SHAPES = ((32, 112), (48, 112), (72, 56), (240, 28), (480, 14), (1152, 7))  # channels, side


def both_passes(channels, side, fast):
    """Return a function that does both passes of the layers, in our faster form or in torch's."""
    images, gradient = (
        torch.randn(BATCH, channels, side, side).bfloat16().to(memory_format=torch.channels_last) for _ in range(2)
    )
    images.requires_grad_()
    layers = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    device.keep_freed_memory()
    if fast:
        batchnorm.speed_up(layers)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = layers(images)
        torch.autograd.grad(result, [images, *layers.parameters()], gradient)

    return run


def run():
    """Print the table."""
    rows = []
    for channels, side in SHAPES:
        forms = {name: (both_passes, channels, side, name == "ours") for name in ("ours", "torch's")}
        turns = measure.in_turns(forms, ROUNDS)
        milliseconds = ["{:.2f}".format(1000 * turns[name].seconds) for name in forms]
        shape = "{} channels, {}x{}".format(channels, side, side)
        rows.append([shape, *milliseconds, "{:.2f}".format(turns["torch's"].seconds / turns["ours"].seconds)])
    headers = ["BatchNorm and ReLU, batch {}".format(BATCH), "ours, ms", "torch's, ms", "ours is faster by"]
    print(measure.table(headers, rows))
