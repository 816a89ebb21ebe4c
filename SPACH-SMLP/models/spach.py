"""SPACH, "A Battle of Network Structures" (https://arxiv.org/abs/2108.13002): MLP, convolution, attention in one frame.

This file has the blocks and the single-scale networks, `spach_ms.py` the multi-scale ones. The state_dict keys and the
initial weights are those of microsoft/SPACH. Tokens are (batch, side * side, channels), images (batch, channels, side,
side).
"""

import torch
from torch import nn
from torch.nn import functional as F

from .layers import DropPath, check_images, check_sizes

LAYER_NORM_EPS = 1e-6
HEAD_DIM = 32  # channels of one attention head


def to_tokens(x):
    """Return the image `x` as tokens."""
    return x.flatten(2).transpose(1, 2)


class PatchEmbed(nn.Module):
    """Image to a smaller image of `dim` channels: one strided convolution, or four with `deep`."""

    def __init__(self, dim, patch_size, deep=False):
        super().__init__()
        if not deep:
            self.proj = nn.Conv2d(3, dim, patch_size, patch_size)
            return
        layers, inputs = [], 3
        for kernel, stride in ((7, 2), (3, 1), (3, 1)):
            conv = nn.Conv2d(inputs, 64, kernel, stride, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(64), nn.ReLU()]
            inputs = 64
        self.proj = nn.Sequential(*layers, nn.Conv2d(64, dim, patch_size // 2, patch_size // 2))

    def forward(self, x):
        return self.proj(x)


class MLP(nn.Module):
    """Two linear layers over the last axis, which keeps its length `features`."""

    def __init__(self, features, hidden):
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, features)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TokenMLP(MLP):
    """The MLP over the tokens of each channel."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0] * self.scale, qkv[1], qkv[2]
        weights = (query @ key.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, dim))


class OnImage(nn.Module):
    """Apply `layer` to the tokens laid out as an image of `side` x `side`."""

    def __init__(self, side, layer):
        super().__init__()
        self.side = side
        # The index 1 is upstream's: there the two changes of layout are modules, 0 and 2.
        self.net = nn.Sequential(nn.Identity(), layer)

    def forward(self, x):
        batch, _, dim = x.shape
        return to_tokens(self.net(x.transpose(1, 2).reshape(batch, dim, self.side, self.side)))


def _token_mixer(kind, dim, num_tokens, num_heads):
    """Return the layer of that kind, None for "pass": such a block mixes tokens by its convolution alone."""
    if kind == "mlp":
        return TokenMLP(num_tokens, num_tokens // 2)
    return Attention(dim, num_heads) if kind == "attn" else None


class MixingBlock(nn.Module):
    """Mix tokens, by `kind` ("mlp", "attn" or "pass") and a depthwise convolution side by side, then channels."""

    def __init__(self, kind, dim, side, num_heads, channel_ratio, drop_path_rate):
        super().__init__()
        mixer = _token_mixer(kind, dim, side * side, num_heads)
        self.mixes_tokens = mixer is not None
        if self.mixes_tokens:
            self.spatial_func = mixer
            self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
            self.gamma_1 = nn.Parameter(torch.full((1, 1, dim), 1e-4))
        self.channel_func = MLP(dim, int(dim * channel_ratio))
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.drop_path = DropPath(drop_path_rate)
        self.cpe_net = OnImage(side, nn.Conv2d(dim, dim, 3, padding=1, groups=dim))

    def forward(self, x):
        y = x + self.cpe_net(x)
        if self.mixes_tokens:
            y = y + self.drop_path(self.gamma_1 * self.spatial_func(self.norm1(x)))
        return y + self.drop_path(self.channel_func(self.norm2(y)))


def init_weights_(model):
    """Initialise the linear layers and convolutions of `model`; the norms start as 1 and 0 by themselves."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(model.head.weight)  # the first logits are 0: the loss starts at log(num_classes)


class Spach(nn.Module):
    """Images (batch, 3, image_size, image_size) of any floating dtype to logits (batch, num_classes).

    `depth` blocks of one `kind`. All of them have the same drop path rate, unlike those of the other networks here:
    so it is upstream. Raises ValueError for sizes and rates that are impossible, and for images of another size.
    """

    classifier_keys = ("head",)

    def __init__(self, kind, depth, dim, channel_ratio, num_classes, drop_path_rate, image_size):
        super().__init__()
        patch_size = 16
        check_sizes(num_classes, image_size, patch_size)
        self.image_size = image_size
        side = image_size // patch_size
        self.stem = PatchEmbed(dim, patch_size)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.blocks = nn.Sequential(
            *(MixingBlock(kind, dim, side, dim // HEAD_DIM, channel_ratio, drop_path_rate) for _ in range(depth))
        )
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        init_weights_(self)

    def forward(self, x):
        check_images(x, self.image_size)
        x = self.norm1(to_tokens(self.stem(x)))
        return self.head(self.norm2(self.blocks(x)).mean(1))


def spach_xxs_patch16_224_mlp(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-MLP-XXS, 8.3 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("mlp", 12, 384, 2.0, num_classes, drop_path_rate, image_size)


def spach_xxs_patch16_224_conv(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Conv-XXS, 7.8 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("pass", 12, 384, 2.0, num_classes, drop_path_rate, image_size)


def spach_xxs_patch16_224_attn(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Trans-XXS, 3.9 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("attn", 12, 192, 2.0, num_classes, drop_path_rate, image_size)


def spach_xs_patch16_224_mlp(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-MLP-XS, 15.9 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("mlp", 24, 384, 2.0, num_classes, drop_path_rate, image_size)


def spach_xs_patch16_224_conv(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Conv-XS, 15.0 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("pass", 24, 384, 2.0, num_classes, drop_path_rate, image_size)


def spach_xs_patch16_224_attn(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Trans-XS, 14.9 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("attn", 12, 384, 2.0, num_classes, drop_path_rate, image_size)


def spach_s_patch16_224_mlp(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-MLP-S, 39.8 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("mlp", 24, 512, 3.0, num_classes, drop_path_rate, image_size)


def spach_s_patch16_224_conv(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Conv-S, 38.9 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("pass", 24, 512, 3.0, num_classes, drop_path_rate, image_size)


def spach_s_patch16_224_attn(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Trans-S, 32.5 M parameters; inputs, outputs and errors as `Spach`."""
    return Spach("attn", 12, 512, 3.0, num_classes, drop_path_rate, image_size)
