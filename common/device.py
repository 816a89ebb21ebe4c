"""The device of this process: which card it is, seeds, memory layout, the form of the optimizer."""

import contextlib
import ctypes
import inspect
import math
import os
import platform
import random
import resource
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import torch

import common
from common import distributed, npu
from common.errors import UserError


def choose_type(name):
    """Return "npu", "cuda" or "cpu" for the value of `--device`; raise UserError where it is not there."""
    if name in ("npu", "auto"):
        problem = npu.find_problem()
        if problem is None:
            return "npu"
        if name == "npu":
            raise UserError("--device npu: {}".format(problem))
    if name != "cpu" and torch.cuda.is_available():
        return "cuda"
    if name in ("gpu", "cuda"):
        raise UserError("--device {}: this torch sees no CUDA card (nvidia-smi lists them)".format(name))
    if name == "auto" and common.NPU_PROBLEM:  # who has installed torch_npu does not want to wait for a CPU
        raise UserError("{}. --device cpu trains without it".format(common.NPU_PROBLEM))
    return "cpu"


def _card_ids(args):
    ids, world = distributed.card_ids(args), distributed.Ranks().local_world_size
    is_by_torchrun = distributed.is_distributed() and len(ids) != world  # which said how many there are
    return list(range(world)) if is_by_torchrun else ids


def check(args):
    """Raise UserError where the device of type `args.device` has too few cards or cannot do what other options want."""
    if args.fused_optimizer and args.device != "npu":
        raise UserError("--fused-optimizer is the NPU's; on {} torch's own is fused already".format(args.device))
    if args.compile:
        _check_compiler(args.device)
    last, count = max(_card_ids(args)), math.inf if args.device == "cpu" else getattr(torch, args.device).device_count()
    if last >= count:  # the same on all ranks: the first one says it
        visible = npu.visible_devices() if args.device == "npu" else ""
        text = "card {} was asked for, this machine has {} (0 to {}){}"
        raise UserError(text.format(last, count, count - 1, visible))


class Device:
    """One process's card and its place among the ranks.

    Attributes:
        type: "npu", "cuda" or "cpu"; module: `torch.npu`, `torch.cuda` or None.
        torch_device: the `torch.device` to put tensors on; name: what the card or processor calls itself.
        ranks: the `common.distributed.Ranks` of this process.
        channels_last: whether convolutions are faster on NHWC memory, an error on NPU; compiles: with `--compile`.
        notices: lines for the log: what was chosen for the user.
    """

    def __init__(self, args):
        """Take this rank's card, join the ranks, seed everything; raise UserError where one of them fails."""
        self.type, self.ranks, self.notices = choose_type(args.device), distributed.Ranks(), []
        self.module = None if self.type == "cpu" else getattr(torch, self.type)
        self.channels_last = self.type != "npu" and args.memory_format == "auto"
        self._fused_optimizer, self.compiles = args.fused_optimizer, args.compile
        if self.module is None:
            self.torch_device, self.name = torch.device("cpu"), processor_name()
            keep_freed_memory()
            self._share_cores()
        else:
            self._take_card(_card_ids(args)[self.ranks.local_rank], args.jit_compile)
        if hasattr(torch.backends.cuda, "matmul"):  # float32 is float32: a card's TF32 has ten bits of it
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        backend = args.dist_backend or {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[self.type]
        self.ranks.join(backend)
        seed_everything(args.seed)

    def _take_card(self, number, jit_compile):
        self.torch_device = torch.device(self.type, number)
        self.module.set_device(self.torch_device)
        if self.type == "npu":
            npu.set_up(self.module, jit_compile)
        self.name = getattr(self.module, "get_device_name", str)(self.torch_device)  # torch 1.5 has no names of NPUs
        self._copies = None
        with contextlib.suppress(AttributeError, RuntimeError):  # old versions have no streams, or no pinned memory
            torch.zeros(1).pin_memory()
            self._copies = self.module.Stream()

    def _share_cores(self):
        """Give each rank of a CPU job its own cores, where there are enough."""
        world, rank = self.ranks.local_world_size, self.ranks.local_rank
        if world > 1 and hasattr(os, "sched_getaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            share = len(cores) // world
            if share:
                os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])
            torch.set_num_threads(max(1, share))

    def synchronize(self):
        """Wait until the device has done everything it was given."""
        if self.module is not None:
            self.module.synchronize()

    def memory_gib(self):
        """Return the most memory that tensors took on the card so far, on a CPU that this process took, in GiB."""
        if hasattr(self.module, "max_memory_allocated"):
            return self.module.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def benchmark(self, wanted):
        """Have cuDNN try its algorithms for each shape; raise UserError if that is `wanted` without cuDNN."""
        if wanted and self.type != "cuda":
            raise UserError("--benchmark 1 is for CUDA; {} has no algorithms to try".format(self.type))
        torch.backends.cudnn.benchmark = bool(wanted)

    def prepare(self, item):
        """Return `item` (a model, or a batch of images) on the device, in the layout that its convolutions like."""
        item = item.to(self.torch_device)
        return item.to(memory_format=torch.channels_last) if self.channels_last else item

    def upload(self, tensor):
        """Return a copy on the device of a `tensor` in memory, made while the device goes on with earlier work."""
        if self.module is None or self._copies is None:
            return tensor.to(self.torch_device, copy=True)
        with self.module.stream(self._copies):
            copy = tensor.pin_memory().to(self.torch_device, non_blocking=True)
        stream = self.module.current_stream()
        stream.wait_stream(self._copies)
        copy.record_stream(stream)  # its memory is not given away before what is queued has read it
        return copy

    def parallel(self, model):
        """Return `model` wrapped for several ranks and compiled, for training; BatchNorm's buffers stay local."""
        if self.ranks.world_size > 1:
            wrapper = torch.nn.parallel.DistributedDataParallel
            newer = "forward_sync_buffers" in inspect.signature(wrapper.__init__).parameters
            stay_local = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
            device_ids = None if self.module is None else [self.torch_device.index]
            model = wrapper(model, device_ids=device_ids, **stay_local)
        return torch.compile(model) if self.compiles else model

    def optimizer(self, kind, params, **options):
        """Return the optimizer `kind` ("SGD" or "AdamW") of `params` in the fastest form of torch's own result."""
        if self._fused_optimizer:
            return npu.fused_optimizer(kind)(params, **options)
        params = list(params)  # several attempts would use a generator up
        # Unless told, torch_npu queries the card for foreach, also where there is none.
        for form in {"npu": (), "cuda": ({"fused": True},), "cpu": ({"fused": True}, {"foreach": False})}[self.type]:
            # An optimizer writes its options into the groups, also when it then refuses them.
            groups = [dict(item) if isinstance(item, dict) else item for item in params]
            with contextlib.suppress(TypeError, RuntimeError):  # not in this torch, or not for this device
                return getattr(torch.optim, kind)(groups, **form, **options)
        return getattr(torch.optim, kind)(params, **options)


def _check_compiler(kind):
    """Raise UserError where torch.compile cannot work, as far as can be known without trying."""
    if kind == "npu" or not hasattr(torch, "compile"):
        raise UserError("--compile is for CUDA and CPU and torch 2; on an NPU --jit-compile on compiles operators")
    if kind == "cuda" and find_spec("triton") is None:
        raise UserError("--compile needs triton: pip install triton")
    if kind == "cpu" and not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])):
        raise UserError("--compile needs a C++ compiler on a CPU, such as g++")


def keep_freed_memory():
    """Have malloc keep what is freed: else each step gives its tensors back, and takes them again page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # <malloc.h>
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def _processor(*keys):
    """Return the value of the first line of /proc/cpuinfo that begins with one of `keys`, or an empty string."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith(keys)), "")
    return ""


def processor_name():
    """Return the processor's model name."""
    return _processor("model name") or platform.machine()


def has_fast_bfloat16():
    """Return whether the processor multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_processor("flags", "Features").split())


def seed_everything(seed, *position):
    """Seed Python's, numpy's and torch's generators with all the numbers (ints from 0 on) together."""
    # torch's generator on a CPU, and numpy's, take 32 bits of a seed alone: Python's mixes the numbers, by SHA-512.
    random.seed(repr([int(number) for number in (seed, *position)]))
    np.random.seed(random.getrandbits(32))
    number = random.getrandbits(63)
    torch.default_generator.manual_seed(number)
    for backend in (torch.cuda, getattr(torch, "npu", None)):  # torch.manual_seed is slow without a card: 90 us
        if hasattr(backend, "is_initialized") and backend.is_initialized():
            backend.manual_seed_all(number)


def describe_environment():
    """Return a dict of the versions that a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    if "torch_npu" in sys.modules:
        found["torch_npu"] = sys.modules["torch_npu"].__version__
    return found
