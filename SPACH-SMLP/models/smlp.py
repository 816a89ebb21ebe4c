"""sMLPNet, "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?" (https://arxiv.org/abs/2109.05422).

The state_dict keys are those of microsoft/SPACH, misspelt `proh_w` included, so that its checkpoints load. The weights
start as torch initialises them, as there.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from .layers import DropPath, check_images, check_sizes


class Permute(nn.Module):
    """`x.permute(dims)` as a module, with a place in a Sequential."""

    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


class SparseMLP(nn.Module):
    """Mix every pixel with its row and with its column: (batch, channels, side, side) to the same shape."""

    def __init__(self, channels, side):
        super().__init__()
        self.BN = nn.BatchNorm2d(channels)
        self.proj_h = nn.Conv2d(side, side, 1)
        self.proh_w = nn.Conv2d(side, side, 1)
        self.fuse = nn.Conv2d(3 * channels, channels, 1, bias=False)

    def forward(self, x):
        x = F.gelu(self.BN(x))
        # A 1x1 convolution mixes axis 1, so the axis to mix has to move there. Only a permute moves it: a reshape to
        # the same shape deals out the same numbers to other places, a network that official weights do not fit.
        along_w = self.proj_h(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        along_h = self.proh_w(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
        return self.fuse(torch.cat((x, along_w, along_h), dim=1))


def _token_mixing(channels, side):
    """Return BN, GELU, depthwise 3x3, then the sparse MLP."""
    depthwise = OrderedDict(
        BN=nn.BatchNorm2d(channels),
        Activation=nn.GELU(),
        Conv=nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
    )
    return nn.Sequential(nn.Sequential(OrderedDict(conv_merge=nn.Sequential(depthwise))), SparseMLP(channels, side))


def _channel_mixing(channels, hidden):
    """Return LayerNorm and an MLP over the channels of (batch, channels, side, side)."""
    # Upstream has a dropout of rate 0 after each Linear: an Identity keeps the second Linear's key `net.3`.
    net = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, channels))
    return nn.Sequential(
        Permute(0, 2, 3, 1), nn.LayerNorm(channels), nn.Sequential(OrderedDict(net=net)), Permute(0, 3, 1, 2)
    )


class SMLPNet(nn.Module):
    """Images (batch, 3, image_size, image_size) of any floating dtype to logits (batch, num_classes).

    Four stages of `depths` blocks, the channels doubling from `dim`; the drop path rate rises linearly from 0 in the
    first block to `drop_path_rate` in the last. Raises ValueError for sizes and rates that are impossible, and for
    images of another size: the rows and columns that are mixed are as long as the image is wide and high.
    """

    classifier_keys = ("mlp_head.0",)

    def __init__(self, dim, depths, num_classes=1000, drop_path_rate=0.0, image_size=224, patch_size=4, mlp_ratio=3):
        super().__init__()
        check_sizes(num_classes, image_size, patch_size * 2 ** (len(depths) - 1))
        self.depths = depths
        self.image_size = image_size
        self.to_patch_embedding = nn.ModuleList()
        self.token_mix = nn.ModuleList()
        self.channel_mix = nn.ModuleList()
        self.drop_path = nn.ModuleList(DropPath(drop_path_rate * i / (sum(depths) - 1)) for i in range(sum(depths)))

        inputs, channels, side, patch = 3, dim, image_size, patch_size
        for depth in depths:
            side //= patch
            self.to_patch_embedding.append(nn.Sequential(nn.Conv2d(inputs, channels, patch, patch, bias=False)))
            for _ in range(depth):
                # Upstream draws the weights in this order, so the same seed starts the same network.
                self.channel_mix.append(_channel_mixing(channels, channels * mlp_ratio))
                self.token_mix.append(_token_mixing(channels, side))
            inputs, channels, patch = channels, channels * 2, 2

        self.batch_norm = nn.BatchNorm2d(inputs)
        self.mlp_head = nn.Sequential(nn.Linear(inputs, num_classes))

    def forward(self, x):
        check_images(x, self.image_size)
        blocks = zip(self.token_mix, self.channel_mix, self.drop_path)
        for embed, depth in zip(self.to_patch_embedding, self.depths):
            x = embed(x)
            for _ in range(depth):
                token_mix, channel_mix, drop_path = next(blocks)
                x = x + drop_path(token_mix(x))
                x = x + drop_path(channel_mix(x))
        return self.mlp_head(self.batch_norm(x).mean((2, 3)))


def smlpnet_tiny(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return sMLPNet-T, 24.1 M parameters, Acc@1 81.9 %; inputs, outputs and errors as `SMLPNet`."""
    return SMLPNet(80, (2, 8, 14, 2), num_classes, drop_path_rate, image_size)


def smlpnet_small(num_classes=1000, drop_path_rate=0.2, image_size=224):
    """Return sMLPNet-S, 48.6 M parameters, Acc@1 83.1 %; inputs, outputs and errors as `SMLPNet`."""
    return SMLPNet(96, (2, 10, 24, 2), num_classes, drop_path_rate, image_size)


def smlpnet_base(num_classes=1000, drop_path_rate=0.3, image_size=224):
    """Return sMLPNet-B, 65.9 M parameters, Acc@1 83.4 %; inputs, outputs and errors as `SMLPNet`."""
    return SMLPNet(112, (2, 10, 24, 2), num_classes, drop_path_rate, image_size)
