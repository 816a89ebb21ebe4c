"""SPNASNet-100: the network that Single-Path NAS found for the Pixel 1 phone (https://arxiv.org/abs/1904.02877).

It is the network timm calls `spnasnet_100`: same state_dict keys in the same order, same initialisation, hence timm's
checkpoint loads and its training recipes apply. It is not MnasNet-B1: kernel and expansion change within a stage.
"""

import math

from torch import nn

_STEM_CHANNELS, _FIRST_CHANNELS, _HEAD_CHANNELS = 32, 16, 1280

# For each stage: channels, stride of its first block, (kernel, expansion) of every block.
_STAGES = (
    (24, 2, ((3, 3), (3, 3), (3, 3))),
    (40, 2, ((5, 6), (3, 3), (3, 3), (3, 3))),
    (80, 2, ((5, 6), (3, 3), (3, 3), (3, 3))),
    (96, 1, ((5, 6), (5, 3), (5, 3), (5, 3))),
    (192, 2, ((5, 6), (5, 6), (5, 6), (5, 6))),
    (320, 1, ((3, 6),)),
)


def _conv(inputs, outputs, kernel=1, stride=1, groups=1):
    """Return a convolution padded alike on all sides; the norm after it has the bias."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class SeparableConv(nn.Module):
    """Depthwise 3x3, then pointwise without activation; as its channels change, it has no shortcut."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv_dw = _conv(inputs, inputs, 3, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = _conv(inputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(x))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with a shortcut where input and output have the same shape."""

    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        inner = inputs * expansion
        self.conv_pw = _conv(inputs, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv_dw = _conv(inner, inner, kernel, stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv_pwl = _conv(inner, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.act(self.bn1(self.conv_pw(x)))
        y = self.act(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.shortcut else y


class SPNASNet(nn.Module):
    """Images (batch, 3, height, width) of any floating dtype to logits (batch, num_classes); 224 x 224 as published.

    Without BatchNorm in training mode any size from 1 x 1 works; the total stride is 32.
    """

    classifier_keys = ("classifier",)

    def __init__(self, num_classes=1000, dropout=0.0):
        super().__init__()
        self.conv_stem = _conv(3, _STEM_CHANNELS, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS)

        stages = [nn.Sequential(SeparableConv(_STEM_CHANNELS, _FIRST_CHANNELS))]
        inputs = _FIRST_CHANNELS
        for outputs, stride, blocks in _STAGES:
            stage = []
            for kernel, expansion in blocks:
                stage.append(InvertedResidual(inputs, outputs, kernel, stride, expansion))
                inputs, stride = outputs, 1
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)

        self.conv_head = _conv(inputs, _HEAD_CHANNELS)
        self.bn2 = nn.BatchNorm2d(_HEAD_CHANNELS)
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(_HEAD_CHANNELS, num_classes)
        self.init_weights()

    def init_weights(self):
        """Fan-out initialisation of Google's mobile networks; BatchNorm starts as 1 and 0 by itself."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # nn.init.kaiming_normal_ would count the other groups' outputs too: 1/sqrt(channels) for depthwise.
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        bound = 1.0 / math.sqrt(self.classifier.out_features)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        x = self.act(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = self.act(self.bn2(self.conv_head(x)))
        return self.classifier(self.dropout(x.mean((2, 3))))


def spnasnet_100(num_classes=1000, dropout=0.0):
    """Return SPNASNet-100 with random weights: (batch, 3, 224, 224) to logits (batch, num_classes), 4.42 M parameters.

    `dropout` is the share of the head's inputs that a training step leaves out. Source: timm's `spnasnet_100`,
    whose checkpoint reaches 74.086 % Acc@1. Raises ValueError if `num_classes` < 1.
    """
    if num_classes < 1:
        raise ValueError("num_classes must be at least 1, not {}".format(num_classes))
    return SPNASNet(num_classes, dropout)
