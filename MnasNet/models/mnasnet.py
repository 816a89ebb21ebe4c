"""MnasNet-B1 (Tan et al., 2019, https://arxiv.org/abs/1807.11626), with the state_dict keys of torchvision."""

from torch import nn

TORCHVISION_BN_MOMENTUM = 1 - 0.9997  # TensorFlow's decay 0.9997; the recipe of this bundle trains with 0.1

# (kernel, stride, expansion, repeats) of the six stages
STAGES = ((3, 2, 3, 3), (5, 2, 3, 3), (5, 2, 6, 3), (3, 1, 6, 2), (5, 2, 6, 4), (3, 1, 6, 1))
CHANNELS = (32, 16, 24, 40, 80, 96, 192, 320)  # stem, its pointwise half, then one per stage, at width 1.0
FEATURES = 1280


def scaled_channels(width):
    """Return `CHANNELS` times `width`, each rounded to a multiple of 8 and never down by more than a tenth."""
    rounded = [max(8, int(channels * width + 4) // 8 * 8) for channels in CHANNELS]
    return [r if r >= 0.9 * channels * width else r + 8 for r, channels in zip(rounded, CHANNELS)]


def _conv_bn(inputs, outputs, kernel, momentum, stride=1, groups=1):
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs, momentum=momentum)]


def _stem(channels, momentum):
    """Return the modules of the stem: a 3x3 convolution and a separable one."""
    first, second = channels
    return [
        *_conv_bn(3, first, 3, momentum, stride=2),
        nn.ReLU(inplace=True),
        *_conv_bn(first, first, 3, momentum, groups=first),
        nn.ReLU(inplace=True),
        *_conv_bn(first, second, 1, momentum),
    ]


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise convolution, linear projection, with a shortcut where the shapes allow."""

    def __init__(self, inputs, outputs, kernel, stride, expansion, momentum):
        super().__init__()
        self.shortcut = inputs == outputs and stride == 1
        middle = inputs * expansion
        self.layers = nn.Sequential(
            *_conv_bn(inputs, middle, 1, momentum),
            nn.ReLU(inplace=True),
            *_conv_bn(middle, middle, kernel, momentum, stride, groups=middle),
            nn.ReLU(inplace=True),
            *_conv_bn(middle, outputs, 1, momentum),
        )

    def forward(self, x):
        return self.layers(x) + x if self.shortcut else self.layers(x)


class MnasNet(nn.Module):
    """MnasNet-B1 of any width.

    Args:
        width: multiplier of the channels (0.5, 0.75, 1.0 and 1.3 have published weights).
        num_classes: size of the logits.
        dropout: probability in the head.
        bn_momentum: of every BatchNorm.
    """

    classifier_keys = ("classifier.1",)

    def __init__(self, width, num_classes=1000, dropout=0.2, bn_momentum=TORCHVISION_BN_MOMENTUM):
        super().__init__()
        self.bn_momentum = bn_momentum
        channels = scaled_channels(width)
        stages = [
            self._stage(inputs, outputs, *stage) for inputs, outputs, stage in zip(channels[1:], channels[2:], STAGES)
        ]
        head = [*_conv_bn(channels[-1], FEATURES, 1, bn_momentum), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*_stem(channels[:2], bn_momentum), *stages, *head)
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), nn.Linear(FEATURES, num_classes))
        self.apply(_initialise)

    def _stage(self, inputs, outputs, kernel, stride, expansion, repeats):
        blocks = [InvertedResidual(inputs, outputs, kernel, stride, expansion, self.bn_momentum)]
        blocks += [
            InvertedResidual(outputs, outputs, kernel, 1, expansion, self.bn_momentum) for _ in range(repeats - 1)
        ]
        return nn.Sequential(*blocks)

    def use_version_1_stem(self):
        """Take the stem of torchvision's first checkpoints, which has 32 and 16 channels at every width."""
        stem = _stem(CHANNELS[:2], self.bn_momentum)
        outputs = self.layers[len(stem)][-1].layers[-1].num_features
        stem.append(self._stage(CHANNELS[1], outputs, *STAGES[0]))
        for place, module in enumerate(stem):
            self.layers[place] = module

    def forward(self, images):
        """Return logits [B, num_classes] of float images [B, 3, H, W], H and W at least 32."""
        return self.classifier(self.layers(images).mean([2, 3]))


def _initialise(module):
    """Initialise as torchvision does."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight, mode="fan_out", nonlinearity="sigmoid")
        nn.init.zeros_(module.bias)


def mnasnet0_5(num_classes=1000, **options):
    """MnasNet of width 0.5 (67.734 % Acc@1 in torchvision); `options` are those of `MnasNet`."""
    return MnasNet(0.5, num_classes, **options)


def mnasnet0_75(num_classes=1000, **options):
    """MnasNet of width 0.75 (71.180 % Acc@1 in torchvision); `options` are those of `MnasNet`."""
    return MnasNet(0.75, num_classes, **options)


def mnasnet1_0(num_classes=1000, **options):
    """MnasNet of width 1.0 (73.456 % Acc@1 in torchvision); `options` are those of `MnasNet`."""
    return MnasNet(1.0, num_classes, **options)


def mnasnet1_3(num_classes=1000, **options):
    """MnasNet of width 1.3 (76.506 % Acc@1 in torchvision); `options` are those of `MnasNet`."""
    return MnasNet(1.3, num_classes, **options)
