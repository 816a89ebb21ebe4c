"""Faster BatchNorm on a CPU: for training together with the ReLU behind it, for evaluation folded away.

In training both layers are bound by memory, and torch's take almost twice the passes over it that `batchnorm.c` takes.
It is compiled at first use, by a C compiler with OpenMP, and kept in the user's cache. Without one the layers stay
torch's.
"""

import collections
import copy
import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from common.compiled import call, library

try:
    from torch import fx
except ImportError:
    fx = None

_OPTIONS = ("-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-lm")
_SAVED = 4  # floats per channel that `forward` leaves for `backward`
_LEAST = {torch.float32: 2**19, torch.bfloat16: 0}  # numbers in a batch: fewer in float32 stay in the cache


def compiled(dtype):
    """Return `batchnorm.c` compiled for images of `dtype`, or None where it cannot be compiled."""
    return library("batchnorm", *_OPTIONS, "-D" + str(dtype).replace("torch.", "").upper())


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, bias, norm):
        channels = images.shape[1]
        ctx.sizes = images.numel() // channels, channels, int(norm.relu)
        result, saved = torch.empty_like(images), weight.new_empty(_SAVED * channels)
        tensors = images, result, weight, bias, norm.running_mean, norm.running_var, saved
        call(compiled(images.dtype).forward, tensors, *ctx.sizes, norm.momentum, norm.eps)
        ctx.save_for_backward(images, saved)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        images, saved = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        result, of_weight, of_bias = torch.empty_like(images), *saved.new_empty(2, ctx.sizes[1])
        call(compiled(images.dtype).backward, (images, gradient, result, saved, of_weight, of_bias), *ctx.sizes)
        return result, of_weight, of_bias, None


class BatchNorm2d(nn.BatchNorm2d):
    """A `BatchNorm2d` that is faster in training; `relu`: it does the work of the ReLU behind it there."""

    relu = False

    def forward(self, images):
        if not (self.training and self._takes(images)):
            return super().forward(images)
        self.num_batches_tracked.add_(1)
        result = _Function.apply(images, self.weight, self.bias, self)
        result.has_relu = self.relu
        return result

    def _takes(self, images):
        return (
            images.numel() >= _LEAST.get(images.dtype, math.inf)
            and self.weight.dtype == torch.float32
            and images.is_contiguous(memory_format=torch.channels_last)
            and images.numel() > images.shape[1]  # else torch has an error to raise
            and not torch.compiler.is_compiling()
        )


class DoneReLU(nn.ReLU):
    """The ReLU behind a `BatchNorm2d` with `relu`, which has done its work in training."""

    def forward(self, images):
        return images if getattr(images, "has_relu", False) else super().forward(images)


def _before(model, kind):
    """Return {layer of type `kind`: set of the layers whose results it is given}.

    None stands for what is no layer, or is used elsewhere too.
    """
    if fx is None:
        return {}
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda module, name: not any(module.children())
    try:
        nodes = tracer.trace(model).nodes
    except Exception:  # a network that the tracer cannot follow has anything to say
        return {}
    modules = dict(model.named_modules())
    called = {node: modules[node.target] for node in nodes if node.op == "call_module"}
    times, found = collections.Counter(called.values()), {}
    for node, module in called.items():
        if isinstance(module, kind):
            before = called.get(node.args[0])
            only_here = times[before] == 1 and len(node.args[0].users) == 1
            found.setdefault(module, set()).add(before if only_here else None)
    return found


def speed_up(model):
    """Give the model's BatchNorms and the ReLUs behind them their faster forms; return how many there were of each.

    None where `compiled` is None: the layers stay torch's.
    """
    if None in map(compiled, _LEAST):
        return None
    norms = {m for m in model.modules() if type(m) is nn.BatchNorm2d and m.affine and m.track_running_stats}
    norms = {norm for norm in norms if norm.momentum is not None}
    pairs = {relu: before for relu, before in _before(model, nn.ReLU).items() if before <= norms}
    for norm in norms:
        norm.__class__ = BatchNorm2d
    for relu, before in pairs.items():
        relu.__class__ = DoneReLU
        for norm in before:
            norm.relu = True
    return len(norms), len(pairs)


def folded(model):
    """Return a copy of `model` for evaluation, in which convolutions do the work of the BatchNorms behind them.

    Only where each is used once; logits differ by rounding (4e-7 of the largest). The copy has `model`'s mode.
    """
    model = copy.deepcopy(model)
    for norm, (convolution, *others) in _before(model, nn.BatchNorm2d).items():
        usable = norm.affine and norm.track_running_stats and not others
        if usable and isinstance(convolution, nn.Conv2d):
            with torch.no_grad():
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                bias = 0 if convolution.bias is None else convolution.bias
                convolution.weight *= scale.view(-1, 1, 1, 1)
                convolution.bias = nn.Parameter(norm.bias + (bias - norm.running_mean) * scale)
            norm.__class__ = nn.Identity
    return model
