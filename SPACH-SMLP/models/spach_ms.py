"""Multi-scale SPACH: four stages, the tokens a quarter and the channels twice as many from one to the next."""

from torch import nn

from .layers import check_images, check_sizes
from .spach import HEAD_DIM, LAYER_NORM_EPS, MixingBlock, OnImage, PatchEmbed, init_weights_, to_tokens

# For each stage, (kind of token mixing, number of blocks); a stage may change its kind.
_HYBRID_XS = ((("pass", 3),), (("pass", 4),), (("pass", 2), ("attn", 10)), (("pass", 1), ("attn", 2)))
_HYBRID_S = ((("pass", 3),), (("pass", 2), ("attn", 2)), (("pass", 2), ("attn", 10)), (("pass", 1), ("attn", 2)))


def _one_kind(kind, depths):
    """Return stages of one kind, but "pass" in the first: its tokens are too many to mix all with all."""
    return tuple(((kind if stage else "pass", depth),) for stage, depth in enumerate(depths))


def _downsample(side, inputs, outputs):
    """Return a 2x2 patch merging on tokens; GroupNorm with one group normalises channels and places together."""
    conv = nn.Conv2d(inputs, outputs, 2, stride=2, bias=False)
    return OnImage(side, nn.Sequential(conv, nn.GroupNorm(1, outputs)))


class SpachMS(nn.Module):
    """Images (batch, 3, image_size, image_size) of any floating dtype to logits (batch, num_classes).

    The channels double from `dim`, the number of attention heads stays: they widen. The drop path rate rises linearly
    from 0 in the first block to `drop_path_rate` in the last. Raises ValueError for impossible sizes and rates, and for
    images of another size.
    """

    classifier_keys = ("head",)

    def __init__(self, stages, dim, channel_ratio, num_classes, drop_path_rate, image_size, deep_stem=False):
        super().__init__()
        patch_size = 4
        check_sizes(num_classes, image_size, patch_size * 2 ** (len(stages) - 1))
        self.image_size = image_size
        self.stem = PatchEmbed(dim, patch_size, deep_stem)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

        side, num_heads = image_size // patch_size, dim // HEAD_DIM
        last = sum(depth for stage in stages for _, depth in stage) - 1
        index = 0
        for number, stage in enumerate(stages, 1):
            blocks = []
            if number > 1:
                blocks.append(_downsample(side, dim, 2 * dim))
                dim, side = 2 * dim, side // 2
            for kind in (kind for kind, depth in stage for _ in range(depth)):
                rate = drop_path_rate * index / last
                blocks.append(MixingBlock(kind, dim, side, num_heads, channel_ratio, rate))
                index += 1
            setattr(self, "layer{}".format(number), nn.Sequential(*blocks))

        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        init_weights_(self)

    def forward(self, x):
        check_images(x, self.image_size)
        x = self.norm1(to_tokens(self.stem(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.head(self.norm2(x).mean(1))


def spach_ms_xxs_patch4_224_conv(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Conv-MS-XXS, 5.1 M parameters, Acc@1 73.1 %; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("pass", (2, 2, 6, 2)), 64, 2.0, num_classes, drop_path_rate, image_size)


def spach_ms_xxs_patch4_224_mlp(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-MLP-MS-XXS, 6.6 M parameters, Acc@1 74.5 %; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("mlp", (2, 2, 6, 2)), 64, 2.0, num_classes, drop_path_rate, image_size)


def spach_ms_xxs_patch4_224_attn(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Trans-MS-XXS, 2.4 M parameters, Acc@1 65.4 %; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("attn", (2, 2, 6, 2)), 32, 2.0, num_classes, drop_path_rate, image_size)


def spach_ms_xs_patch4_224_conv(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Conv-MS-XS, 17.3 M parameters; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("pass", (3, 4, 12, 3)), 96, 2.0, num_classes, drop_path_rate, image_size)


def spach_ms_xs_patch4_224_mlp(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-MLP-MS-XS, 20.3 M parameters; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("mlp", (3, 4, 12, 3)), 96, 2.0, num_classes, drop_path_rate, image_size)


def spach_ms_xs_patch4_224_attn(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Trans-MS-XS, 14.5 M parameters; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("attn", (3, 4, 12, 3)), 64, 2.0, num_classes, drop_path_rate, image_size)


def spach_ms_s_patch4_224_conv(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Conv-MS-S, 43.6 M parameters, Acc@1 81.6 %; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("pass", (3, 4, 12, 3)), 128, 3.0, num_classes, drop_path_rate, image_size)


def spach_ms_s_patch4_224_mlp(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-MLP-MS-S, 46.5 M parameters, Acc@1 82.1 %; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("mlp", (3, 4, 12, 3)), 128, 3.0, num_classes, drop_path_rate, image_size)


def spach_ms_s_patch4_224_attn(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Trans-MS-S, 39.5 M parameters, Acc@1 82.9 %; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_one_kind("attn", (3, 4, 12, 3)), 96, 3.0, num_classes, drop_path_rate, image_size)


def spach_ms_xs_patch4_224_hybrid(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Hybrid-MS-XS, 28.0 M parameters; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_HYBRID_XS, 96, 2.0, num_classes, drop_path_rate, image_size)


def spach_ms_s_patch4_224_hybrid(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Hybrid-MS-S, 63.0 M parameters, Acc@1 83.7 %; inputs, outputs and errors as `SpachMS`."""
    return SpachMS(_HYBRID_S, 128, 3.0, num_classes, drop_path_rate, image_size)


def spach_ms_s_patch4_224_hybrid_plus(num_classes=1000, drop_path_rate=0.0, image_size=224):
    """Return SPACH-Hybrid-MS-S+, the same with a stem of four convolutions, 63.1 M parameters, Acc@1 83.9 %.

    Upstream has no name for it: its checkpoint `spach_ms_hybrid_s+.pth` needs `stem_type="conv4"` there.
    """
    return SpachMS(_HYBRID_S, 128, 3.0, num_classes, drop_path_rate, image_size, deep_stem=True)
