"""A stand-in for Ascend's build of torch 1.5: `torch.npu` without torch_npu, with the names of that build alone.

Tensors stay on the CPU: `torch.device("npu", 0)` is the CPU. HCCL is gloo.
"""

import types

import torch

_CARDS = 8
_device, _init_process_group = torch.device, torch.distributed.init_process_group
_DistributedDataParallel = torch.nn.parallel.DistributedDataParallel


class _DeviceMeta(type):
    def __instancecheck__(cls, value):
        return isinstance(value, _device)


class device(metaclass=_DeviceMeta):
    def __new__(cls, kind, index=None):
        if str(kind).startswith("npu"):
            return _device("cpu")
        return _device(kind) if index is None else _device(kind, index)


def _set_device(card):
    if not isinstance(card, _device):
        raise AssertionError("input can not convert to torch.device")


def _join(backend, **options):
    return _init_process_group("gloo" if backend == "hccl" else backend, **options)


class DistributedDataParallel(_DistributedDataParallel):
    def __init__(self, module, device_ids=None, **options):
        assert device_ids is not None, "a card's model comes with its card"
        super().__init__(module, **options)


torch.device = device
torch.distributed.init_process_group = _join
torch.nn.parallel.DistributedDataParallel = DistributedDataParallel
torch.npu = types.SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: _CARDS,
    set_device=_set_device,
    current_device=lambda: 0,
    synchronize=lambda device=None: None,
    max_memory_allocated=lambda device=None: 0,
)
