"""Layers and checks that sMLPNet and the SPACH networks share."""

from torch import nn


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for whole images, and scale up the others.

    Takes and returns a tensor (batch, ...) of any floating dtype. Raises ValueError unless 0 <= `drop_prob` < 1.
    """

    def __init__(self, drop_prob=0.0):
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError("the drop path rate must be in [0, 1), not {}".format(drop_prob))
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * kept.div_(keep)

    def extra_repr(self):
        return "drop_prob={:.3f}".format(self.drop_prob)


def check_sizes(num_classes, image_size, patch_size):
    """Raise ValueError, one line, for a network that cannot be built."""
    if num_classes < 1:
        raise ValueError("num_classes must be at least 1, not {}".format(num_classes))
    if image_size < patch_size or image_size % patch_size:
        raise ValueError("the image size {} is no multiple of the patch size {}".format(image_size, patch_size))


def check_images(x, image_size):
    """Raise ValueError unless `x` is (batch, channels, image_size, image_size): token mixing is built for one size."""
    if tuple(x.shape[2:]) != (image_size, image_size):
        raise ValueError(
            "the images have shape {}, the network takes {} x {}".format(tuple(x.shape), image_size, image_size)
        )
