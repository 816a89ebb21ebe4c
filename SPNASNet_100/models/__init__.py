"""The network of this bundle: `getattr(models, name)(num_classes=1000)` for every name in `__all__`."""

from .spnasnet import spnasnet_100

__all__ = ["spnasnet_100"]
