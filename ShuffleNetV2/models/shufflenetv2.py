"""ShuffleNetV2, "Practical Guidelines for Efficient CNN Architecture Design" (https://arxiv.org/abs/1807.11164).

Reference code: torchvision/models/shufflenetv2.py (parameter names, wiring, torch's default initialisation) and, for
`use_megvii_form`, the authors' own megvii-model/ShuffleNet-Series.
"""

import itertools

import torch
import torch.nn as nn

__all__ = ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"]

REPEATS = {"stage2": 4, "stage3": 8, "stage4": 4}
STEM = 24
# Mean and standard deviation of ImageNet's red, green and blue, in steps of 1/255.
PIXELS = ((123.675, 58.395), (116.28, 57.12), (103.53, 57.375))


def _pointwise(in_channels, out_channels):
    return [nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _depthwise(channels, stride):
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class InvertedResidual(nn.Module):
    """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), channels shuffled at the end.

    With stride 1 one half of the channels goes through `branch2`; with stride 2 all go through both branches, of which
    `branch1` gives `kept` channels (half of them if None).
    """

    def __init__(self, in_channels, out_channels, stride, kept=None):
        super().__init__()
        self.stride = stride
        self.half = half = out_channels // 2
        kept = half if kept is None else kept
        branch1 = [] if stride == 1 else _depthwise(in_channels, stride) + _pointwise(in_channels, kept)
        self.branch1 = nn.Sequential(*branch1)
        branch2 = _pointwise(half if stride == 1 else in_channels, half) + _depthwise(half, stride)
        self.branch2 = nn.Sequential(*(branch2 + _pointwise(half, out_channels - kept)))

    def forward(self, x):
        if self.stride == 1:
            kept, x = self.halves(x)
        else:
            kept = self.branch1(x)
        return self.shuffle(kept, self.branch2(x))

    def halves(self, x):
        return x.chunk(2, 1)

    def shuffle(self, kept, new):
        x = torch.cat((kept, new), 1)
        size = x.shape
        return x.view(size[0], 2, self.half, size[2], size[3]).transpose(1, 2).reshape(size)


class MegviiFirstBlock(InvertedResidual):
    """The first block of megvii's 1.0x, 1.5x and 2.0x: `branch1` keeps the stem's 24 channels, `branch2` adds the rest.

    megvii's blocks take the odd channels into `branch2`, torchvision's the second half. So the channels that megvii's
    next three blocks take first have to come last here: slices of both branches, in the order of `megvii_order`.
    """

    def __init__(self, out_channels):
        super().__init__(STEM, out_channels, 2, kept=STEM)
        self.pieces, ends = [], [0, 0]
        for branch, run in itertools.groupby(self.megvii_order(out_channels), key=lambda channel: int(channel >= STEM)):
            start, ends[branch] = ends[branch], ends[branch] + len(list(run))
            self.pieces.append((branch, start, ends[branch]))

    @staticmethod
    def megvii_order(out_channels):
        """Return megvii's index of each channel of the output."""
        return sorted(range(out_channels), key=lambda channel: (-_taken_in(channel), channel))

    def shuffle(self, kept, new):
        branches = (kept, new)
        return torch.cat([branches[branch][:, start:end] for branch, start, end in self.pieces], 1)


def _taken_in(channel):
    """Return which of the three blocks after the first takes a channel of megvii's into its branch (4: none does)."""
    return 1 if channel % 2 else 2 if channel % 4 else 3 if channel % 8 else 4


class ShuffleNetV2(nn.Module):
    classifier_keys = ("fc",)
    block = InvertedResidual

    def __init__(self, widths, num_classes=1000):
        super().__init__()
        self.widths = widths
        conv = nn.Conv2d(3, STEM, 3, 2, 1, bias=False)
        self.conv1 = nn.Sequential(conv, nn.BatchNorm2d(STEM), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = STEM
        for (name, repeats), width in zip(REPEATS.items(), widths):
            blocks = [self.block(channels, width, 2)] + [self.block(width, width, 1) for _ in range(repeats - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            channels = width
        self.conv5 = nn.Sequential(*_pointwise(channels, widths[-1]))
        self.fc = nn.Linear(widths[-1], num_classes)
        self.megvii = False

    def use_megvii_form(self):
        """Turn the network, in place, into the one megvii's checkpoints are for, and return it.

        The images stay normalised RGB; the network itself takes them back to BGR in 0..255, before it pads. Wider than
        0.5x the first block is replaced (a new one, of default initialisation), so load weights and build the
        optimizer afterwards. The state dict gets the integer scalar `megvii_form`, by which `convert` knows the form.
        """
        if not self.megvii:
            self.megvii = True
            weight = self.conv1[0].weight
            self.register_buffer("megvii_form", torch.ones((), dtype=torch.long, device=weight.device))
            if self.widths[0] != 2 * STEM:
                self.stage2[0] = MegviiFirstBlock(self.widths[0]).to(weight).train(self.training)
        return self

    def forward(self, images):
        """Return the logits (N, num_classes) of `images` (N, 3, H, W), RGB normalised with ImageNet's mean and std."""
        if self.megvii:
            images = torch.cat([images[:, i : i + 1] * PIXELS[i][1] + PIXELS[i][0] for i in (2, 1, 0)], 1)
        x = self.maxpool(self.conv1(images))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(x.mean((2, 3)))


def shufflenet_v2_x0_5(num_classes=1000):
    """Build ShuffleNetV2 0.5x for float images (N, 3, 224, 224); `classifier_keys` name the classifier's parameters."""
    return ShuffleNetV2((48, 96, 192, 1024), num_classes)


def shufflenet_v2_x1_0(num_classes=1000):
    """Build ShuffleNetV2 1.0x; see `shufflenet_v2_x0_5`."""
    return ShuffleNetV2((116, 232, 464, 1024), num_classes)


def shufflenet_v2_x1_5(num_classes=1000):
    """Build ShuffleNetV2 1.5x; see `shufflenet_v2_x0_5`."""
    return ShuffleNetV2((176, 352, 704, 1024), num_classes)


def shufflenet_v2_x2_0(num_classes=1000):
    """Build ShuffleNetV2 2.0x; see `shufflenet_v2_x0_5`."""
    return ShuffleNetV2((244, 488, 976, 2048), num_classes)
