"""The MnasNet family."""

from .mnasnet import mnasnet0_5, mnasnet0_75, mnasnet1_0, mnasnet1_3

__all__ = ["mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"]
