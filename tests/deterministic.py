"""Weights and images that are the same everywhere: integer arithmetic on name, shape and index, no random generator.

Two networks with the same state_dict keys and shapes that were filled by `fill_` must give the same logits.
"""

import zlib

import torch

_LOW32 = 0xFFFFFFFF


def _uniform(name, shape):
    """Return float64 values in [-1, 1), the hash (murmur's finaliser) of `name`, `shape` and the index."""
    count = 1
    for extent in shape:
        count *= extent
    bits = torch.arange(1, count + 1, dtype=torch.int64)
    bits.mul_(2654435761).add_(zlib.crc32("{} {}".format(name, tuple(shape)).encode())).bitwise_and_(_LOW32)
    for shift, factor in ((16, 2246822507), (13, 3266489909)):
        bits.bitwise_xor_(bits >> shift).mul_(factor).bitwise_and_(_LOW32)
    bits.bitwise_xor_(bits >> 16)
    return bits.to(torch.float64).div_(2.0**31).sub_(1).reshape(shape)


def fill_(module):
    """Fill all parameters and floating buffers of `module` in place and return it; call `module.double()` before.

    Matrices and kernels get a scale by fan-in that keeps activations O(1), norm weights, layer scales and running_var
    lie in 0.7..1.3, biases and running_mean in -0.1..0.1; integer buffers (num_batches_tracked) stay as they are.
    """
    with torch.no_grad():
        for name, tensor in list(module.named_parameters()) + list(module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            values = _uniform(name, tensor.shape)
            if max(tensor.shape, default=1) < tensor.numel():
                # Variance 4/3 / fan_in: 1 would let the signal die after ReLUs, 2 would let it explode without.
                values *= (4.0 * tensor.shape[0] / tensor.numel()) ** 0.5
            elif name.rpartition(".")[2] in ("bias", "running_mean"):
                values *= 0.1
            else:
                values = 1 + 0.3 * values
            tensor.copy_(values)
    return module


def images(n, size):
    """Return a float64 tensor (n, 3, size, size) of mean 0 and variance 1; image i does not depend on n."""
    return torch.stack([_uniform("image {}".format(i), (3, size, size)) for i in range(n)]) * 3.0**0.5
