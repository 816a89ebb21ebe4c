from .pnasnet import pnasnet5large

__all__ = ["pnasnet5large"]
