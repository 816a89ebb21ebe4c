"""Two of the fork's optimizers, which step only after `amp.initialize`."""

import torch


def _check(optimizer):
    if not hasattr(optimizer, "_amp_stash"):
        raise RuntimeError("apex.optimizers.{} should be used with AMP.".format(type(optimizer).__name__))


class NpuFusedSGD(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)

    def step(self, closure=None):
        _check(self)
        return super().step(closure)


class NpuFusedAdamW(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)

    def step(self, closure=None):
        _check(self)
        return super().step(closure)
