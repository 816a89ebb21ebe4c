"""PNASNet-5-Large, "Progressive Neural Architecture Search" (https://arxiv.org/abs/1712.00559).

Reference code: Cadene/pretrained-models.pytorch, a port of TensorFlow's network, and Ascend/ModelZoo-PyTorch, which
changed its padding for NPU and added the auxiliary head. The parameters have their names.
"""

from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

# Name, channels of each of the five branches, stride. A cell reads the outputs of the two before it.
CELLS = (
    ("cell_stem_1", 108, 2),
    ("cell_0", 216, 1),
    ("cell_1", 216, 1),
    ("cell_2", 216, 1),
    ("cell_3", 216, 1),
    ("cell_4", 432, 2),
    ("cell_5", 432, 1),
    ("cell_6", 432, 1),
    ("cell_7", 432, 1),
    ("cell_8", 864, 2),
    ("cell_9", 864, 1),
    ("cell_10", 864, 1),
    ("cell_11", 864, 1),
)


def _batch_norm(channels):
    return nn.BatchNorm2d(channels, eps=0.001)


def _conv_bn(in_channels, out_channels, kernel_size=1, stride=1):
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=False)
    return nn.Sequential(OrderedDict([("conv", conv), ("bn", _batch_norm(out_channels))]))


def _separable_conv(in_channels, out_channels, kernel_size, stride, padding):
    depthwise = nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False)
    pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(OrderedDict([("depthwise_conv2d", depthwise), ("pointwise_conv2d", pointwise)]))


def _drop_path(x, rate):
    keep = 1.0 - rate
    mask = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < keep
    return x * (mask.to(x.dtype) / keep)


class BranchSeparables(nn.Module):
    """Two separable convolutions; the ReLU before the first is the caller's, who shares it between branches."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, zero_pad=False, drop_path_rate=0.0):
        super().__init__()
        padding = kernel_size // 2
        # The original adds a row and a column of zeros at top and left and drops those of the result. That moves the
        # windows by one pixel, as here one pixel less of padding there and one more at bottom and right do.
        self.zero_pad = nn.ZeroPad2d((0, 1, 0, 1)) if zero_pad else None
        self.separable_1 = _separable_conv(in_channels, out_channels, kernel_size, stride, padding - int(zero_pad))
        self.bn_sep_1 = _batch_norm(out_channels)
        self.separable_2 = _separable_conv(out_channels, out_channels, kernel_size, 1, padding)
        self.bn_sep_2 = _batch_norm(out_channels)
        self.drop_path_rate = drop_path_rate

    def forward(self, x):
        if self.zero_pad is not None:
            x = self.zero_pad(x)
        x = F.relu(self.bn_sep_1(self.separable_1(x)), inplace=True)
        x = self.bn_sep_2(self.separable_2(x))
        if self.training and self.drop_path_rate > 0:
            x = _drop_path(x, self.drop_path_rate)
        return x


class FactorizedReduction(nn.Module):
    """Halve the map: one 1x1 convolution of the even pixels, one of the odd ones (without `shift` the even again)."""

    def __init__(self, in_channels, out_channels, shift):
        super().__init__()
        self.shift = shift
        self.path_1 = self._path(in_channels, out_channels // 2)
        self.path_2 = self._path(in_channels, out_channels // 2)
        self.final_path_bn = _batch_norm(out_channels)

    @staticmethod
    def _path(in_channels, out_channels):
        return nn.Sequential(OrderedDict([("conv", nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False))]))

    def forward(self, x):
        shifted = F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1)) if self.shift else x
        return self.final_path_bn(torch.cat((self.path_1(x), self.path_2(shifted)), 1))


class Cell(nn.Module):
    """Five sums of two branches, concatenated: (N, left, H', W') and (N, right, H, W) to (N, 5 * channels, H/s, W/s).

    Whatever reads the output of a cell begins with a ReLU, so inputs and outputs are those after the ReLU.
    """

    def __init__(self, left, right, channels, stride, project=None, zero_pad=False, drop_path_rate=0.0):
        super().__init__()
        drop = drop_path_rate
        stem = project is None  # the first cell: its left input is the image stem itself, not projected
        if not stem:
            self.conv_prev_1x1 = project
        self.conv_1x1 = _conv_bn(right, channels)
        # The windows of the original, moved as in BranchSeparables, start at the first pixel.
        self.pool = nn.MaxPool2d(3, stride, ceil_mode=True) if zero_pad else nn.MaxPool2d(3, stride, padding=1)
        left = left if stem else channels
        left_drop = 0.0 if stem else drop
        self.comb_iter_0_left = BranchSeparables(left, channels, 5, stride, zero_pad, left_drop)
        self.comb_iter_0_right = self.pool
        if stem:
            conv = nn.Conv2d(left, channels, 1, bias=False)
            norm = _batch_norm(channels)
            self.comb_iter_0_right = nn.Sequential(OrderedDict([("max_pool", self.pool), ("conv", conv), ("bn", norm)]))
        self.comb_iter_1_left = BranchSeparables(channels, channels, 7, stride, zero_pad, drop)
        self.comb_iter_2_left = BranchSeparables(channels, channels, 5, stride, zero_pad, drop)
        self.comb_iter_2_right = BranchSeparables(channels, channels, 3, stride, zero_pad, drop)
        self.comb_iter_3_left = BranchSeparables(channels, channels, 3, drop_path_rate=drop)
        self.comb_iter_4_left = BranchSeparables(left, channels, 3, stride, zero_pad, left_drop)
        self.comb_iter_4_right = _conv_bn(channels, channels, stride=stride) if stride > 1 else None

    def forward(self, left, right):
        left, right = self.conv_prev_1x1(left), self.conv_1x1(right)
        return self.combine(left, F.relu(left), right)

    def combine(self, left, left_relu, right):
        right_relu, pooled = F.relu(right), self.pool(right)
        middle = self.comb_iter_2_left(right_relu) + self.comb_iter_2_right(right_relu)
        last = right if self.comb_iter_4_right is None else self.comb_iter_4_right(right_relu)
        sums = (
            self.comb_iter_0_left(left_relu) + self.comb_iter_0_right(left),
            self.comb_iter_1_left(right_relu) + pooled,
            middle,
            self.comb_iter_3_left(F.relu(middle)) + pooled,
            self.comb_iter_4_left(left_relu) + last,
        )
        return F.relu(torch.cat(sums, 1), inplace=True)


class CellStem0(Cell):
    def forward(self, stem, stem_relu):
        return self.combine(stem, stem_relu, self.conv_1x1(stem_relu))


class AuxiliaryHead(nn.Module):
    """Logits from the output of cell_8; its batch norms keep torch's eps 1e-5."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(7, stride=2),
            nn.Conv2d(in_channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 3, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        if min(x.shape[2:]) < 11:
            got = "{}x{}".format(*x.shape[2:])
            raise ValueError("the auxiliary head needs a map of 11x11 (images of 331 pixels), not {}".format(got))
        return self.classifier(self.features(x).mean((2, 3)))


class PNASNet5Large(nn.Module):
    classifier_keys = ("last_linear", "aux.classifier")

    def __init__(self, num_classes=1000, use_aux=False, zero_pad=False, drop_path_rate=0.0, dropout=0.5):
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError("drop_path_rate must be in [0, 1), not {}".format(drop_path_rate))
        self.use_aux = use_aux
        self.zero_pad = zero_pad
        # TensorFlow's schedule: linear in depth, the last cell gets the full rate.
        rates = [drop_path_rate * (depth + 1) / (len(CELLS) + 1) for depth in range(len(CELLS) + 1)]
        self.conv_0 = _conv_bn(3, 96, kernel_size=3, stride=2)
        self.cell_stem_0 = CellStem0(96, 96, 54, 2, drop_path_rate=rates[0])
        left, right, halved = 96, 5 * 54, True
        for (name, channels, stride), rate in zip(CELLS, rates[1:]):
            # Where the cell before halved its map, the left input is still twice as large.
            project = FactorizedReduction(left, channels, shift=zero_pad) if halved else _conv_bn(left, channels)
            pad = zero_pad and name == "cell_4"
            self.add_module(name, Cell(left, right, channels, stride, project, pad, rate))
            left, right, halved = right, 5 * channels, stride == 2
            if use_aux and name == "cell_8":
                self.aux = AuxiliaryHead(right, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(right, num_classes)

    def forward(self, images):
        """Return the logits of `images` (N, 3, H, W); in training with `use_aux` the pair (logits, aux_logits)."""
        with_aux = self.use_aux and self.training
        stem = self.conv_0(images)
        left = F.relu(stem)
        right = self.cell_stem_0(stem, left)
        for name, _, _ in CELLS:
            left, right = right, getattr(self, name)(left, right)
            if with_aux and name == "cell_8":
                aux_logits = self.aux(right)
        logits = self.last_linear(self.dropout(right.mean((2, 3))))
        return (logits, aux_logits) if with_aux else logits


def pnasnet5large(num_classes=1000, use_aux=False, zero_pad=False, drop_path_rate=0.0, dropout=0.5):
    """Build PNASNet-5-Large for float images (N, 3, 331, 331) normalised with mean and std 0.5.

    Args:
        num_classes: rows of both classifiers; the official checkpoint has 1001, the first for the background.
        use_aux: add the auxiliary head on cell_8. In training the model then returns (logits, aux_logits) and refuses
            images too small for the head (331 pixels do) with a ValueError; else the logits (N, num_classes).
        zero_pad: True is the original network, the one of the official checkpoint (its cell_4 needs an even map, as at
            331 or 224 pixels). False is Ascend's variant: cell_4 pads on all sides, and the second path of every
            FactorizedReduction reads the same pixels as the first. The parameters are the same.
        drop_path_rate: of the last cell, growing linearly with depth. In training it drops each separable branch for
            single images, except the two that read the image stem. Ascend's code has 0.4 in each cell, never active.
        dropout: before the classifier.

    Initialisation is torch's default of each layer, as in both references (TensorFlow's was variance scaling).
    Raises ValueError for a `drop_path_rate` outside [0, 1).
    """
    return PNASNet5Large(num_classes, use_aux, zero_pad, drop_path_rate, dropout)
