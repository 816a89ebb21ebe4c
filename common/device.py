"""The device of this process: which card it is, how fast arithmetic is set up on it, optimizers.

Everything that differs between NPU, CUDA and CPU, or between versions of torch, is decided here; the bundles name none
of them. Versions are never compared: a feature is tried, or looked for with `hasattr`.
"""

import contextlib
import ctypes
import importlib.util
import inspect
import os
import platform
import random
import resource
import shutil
import sys

import numpy as np
import torch

import common
from common import ascend, batchnorm, launcher
from common.errors import UserError
from common.precision import DYNAMIC
from common.precision import Precision as Precision  # the bundles take it from here
from common.ranks import Ranks


def add_arguments(parser, amp=False, opt_level="O1", loss_scale=DYNAMIC):
    """Declare the options of device, ranks and precision; the recipe gives the defaults of the precision."""
    group = parser.add_argument_group("device and precision")
    group.add_argument(
        "--device",
        default="auto",
        choices=["auto", "npu", "gpu", "cuda", "cpu"],
        help="auto: an NPU, else CUDA, else the CPU",
    )
    group.add_argument("--seed", type=int, default=0, help="one seed gives one run: order, crops, weights")
    group.add_argument("--amp", action="store_true", default=amp, help="mixed precision, unless --opt-level is O0")
    group.add_argument("--opt-level", default=opt_level, choices=["O0", "O1", "O2"], help="O0: float32 throughout")
    group.add_argument(
        "--amp-dtype", default="auto", choices=["auto", "float16", "bfloat16"], help="auto: float16 on cards"
    )
    group.add_argument("--loss-scale", "--loss_scale", default=loss_scale, metavar="N|dynamic", help="of float16")
    group.add_argument(
        "--memory-format", default="auto", choices=["auto", "contiguous"], help="auto: channels last, but not on NPU"
    )
    group.add_argument("--stock-layers", action="store_true", help="on a CPU: torch's own, not the faster ones of ours")
    group.add_argument(
        "--compile", action="store_true", help="torch.compile: minutes once, then faster steps, not on NPU"
    )
    group.add_argument("--cpu-batch-size", type=int, metavar="N", help="replaces --batch-size on a CPU")
    group.add_argument("--cpu-max-steps", type=int, metavar="N", help="replaces --max-steps on a CPU")
    group.add_argument("--fused-optimizer", action="store_true", help="the NPU's own fused optimizer (NPU only)")
    group.add_argument(
        "--jit-compile", default="off", choices=["auto", "on", "off"], help="NPU operators; auto: as the chip does"
    )
    launcher.add_arguments(parser)


def choose_type(name):
    """Return "npu", "cuda" or "cpu" for the value of `--device`.

    Raises:
        UserError: the device that was asked for is not there.
    """
    if name == "cpu":
        return "cpu"
    if name == "npu" or name == "auto":
        if ascend.find() is not None:
            return "npu"
        if name == "npu":
            raise UserError("--device npu: {}".format(ascend.why_none()))
    if torch.cuda.is_available():
        return "cuda"
    if name in ("gpu", "cuda"):
        raise UserError("--device {}: this torch sees no CUDA card (nvidia-smi lists them)".format(name))
    if common.NPU_PROBLEM:  # who has installed torch_npu does not want to wait for a CPU
        raise UserError("{}. --device cpu trains without it".format(common.NPU_PROBLEM))
    return "cpu"


class Device:
    """One process's card and its place among the ranks.

    Attributes:
        type: "npu", "cuda" or "cpu".
        torch_device: the `torch.device` to put tensors on.
        ranks: the `common.ranks.Ranks` of this process.
        name: what the card or processor calls itself.
        compiles: whether `parallel` hands models to torch.compile.
        remarks: lines for the log: what was chosen for the user.
    """

    def __init__(self, args):
        """Take this rank's card, join the ranks and seed everything.

        Raises:
            UserError: the card does not exist, or the ranks cannot meet.
        """
        self.type = choose_type(args.device)
        self.remarks = fit_to_cpu(args) if self.type == "cpu" else []
        self.ranks = Ranks()
        self.seed, self._memory_format, self._stock_layers = args.seed, args.memory_format, args.stock_layers
        ids = launcher.card_ids(args)
        if len(ids) != self.ranks.local_world_size:
            ids = list(range(self.ranks.local_world_size))  # torchrun said how many there are
        self._module = {"npu": ascend.find, "cuda": lambda: torch.cuda, "cpu": lambda: None}[self.type]()
        self._fused_optimizer = args.fused_optimizer
        if args.fused_optimizer and self.type != "npu":
            raise UserError("--fused-optimizer is the NPU's; on {} torch's own is fused already".format(self.type))
        if self._module is None:
            self.torch_device = torch.device("cpu")
            keep_freed_memory()
            self._share_cores()
            if "torch_npu" in sys.modules:
                # It would look for a card, and fail without one, wherever data-loading workers are started.
                os.environ["ASCEND_RT_VISIBLE_DEVICES"] = ""
        else:
            card, count = ids[self.ranks.local_rank], self._module.device_count()
            if max(ids) >= count:  # the same on all ranks: the first one says it
                visible = ascend.visible_devices() if self.type == "npu" else ""
                text = "card {} was asked for, this machine has {} (0 to {}){}"
                raise UserError(text.format(max(ids), count, count - 1, visible))
            self.torch_device = torch.device(self.type, card)
            self._module.set_device(self.torch_device)
            if self.type == "npu":
                ascend.set_up(self._module, args.jit_compile)
        self._copies = _copy_stream(self._module)
        self.compiles = args.compile and _check_compiler(self.type)
        self.ranks.join(args.dist_backend or {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[self.type])
        seed_host(args.seed)

    @property
    def name(self):
        """The model name of the card or processor."""
        if self._module is not None:
            name = getattr(self._module, "get_device_name", str)  # torch 1.5 has none for NPUs
            return name(self.torch_device)
        return processor_name()

    def _share_cores(self):
        """Give each rank of a CPU job its own cores, where there are enough and nobody has chosen already."""
        world = self.ranks.local_world_size
        if world == 1 or not hasattr(os, "sched_getaffinity"):
            return
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= world:
            share = len(cores) // world
            first = self.ranks.local_rank * share
            os.sched_setaffinity(0, cores[first : first + share])
        torch.set_num_threads(max(1, len(cores) // world))

    def synchronize(self):
        """Wait until the device has done everything it was given."""
        if self._module is not None:
            self._module.synchronize()

    def memory_gib(self):
        """Return the most memory that tensors took on the card so far, on a CPU that this process took, in GiB."""
        if self._module is None or not hasattr(self._module, "max_memory_allocated"):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return self._module.max_memory_allocated() / 2**30

    def seed_step(self, step):
        """Make what follows random as a function of (seed, rank, step) alone, so that a resumed run repeats it."""
        seed_host((self.seed * 1000003 + step) * 4096 + self.ranks.rank)

    @property
    def likes_channels_last(self):
        """Whether convolutions are faster on NHWC memory; on NPU that layout is an error."""
        return self.type != "npu" and self._memory_format == "auto"

    def benchmark(self, wanted):
        """Have cuDNN try its algorithms for each shape.

        Raises:
            UserError: `wanted`, and the device has no cuDNN.
        """
        if wanted and self.type != "cuda":
            raise UserError("--benchmark 1 is for CUDA; {} has no algorithms to try".format(self.type))
        torch.backends.cudnn.benchmark = bool(wanted)

    def prepare(self, item):
        """Return `item` (a model, or a batch of images) on the device, in the layout that its convolutions like."""
        item = item.to(self.torch_device)
        if not self.likes_channels_last:
            return item
        return item.to(memory_format=torch.channels_last)

    def for_evaluation(self, model):
        """Return `model`, or a copy that gives the same logits faster, in evaluation mode."""
        model.eval()
        return batchnorm.folded(model) if self.type == "cpu" and not self._stock_layers else model

    def upload(self, tensor):
        """Return a copy on the device of a `tensor` in memory, made while the device goes on with earlier work."""
        if self._copies is None:
            return tensor.to(self.torch_device, copy=True)
        with self._module.stream(self._copies):
            copy = tensor.pin_memory().to(self.torch_device, non_blocking=True)
        stream = self._module.current_stream()
        stream.wait_stream(self._copies)
        copy.record_stream(stream)  # its memory is not given away before what is queued has read it
        return copy

    def parallel(self, model):
        """Return `model` compiled, and wrapped for several ranks, for training.

        BatchNorm buffers stay local (see `Ranks.broadcast_buffers`).
        """
        model = self._for_ranks(model)
        return torch.compile(model) if self.compiles else model

    def _for_ranks(self, model):
        if self.ranks.world_size == 1:
            return model
        device_ids = None if self._module is None else [self.torch_device.index]
        wrapper = torch.nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(wrapper.__init__).parameters
        stay_local = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        return wrapper(model, device_ids=device_ids, **stay_local)

    def optimizer(self, kind, parameters, **options):
        """Return the optimizer `kind` ("SGD" or "AdamW") in the fastest form that gives torch's own result.

        Args:
            kind: the name of a class of `torch.optim`.
            parameters: tensors or parameter groups.
            options: its arguments (lr, momentum, weight_decay, ...).
        """
        parameters = list(parameters)  # the first of several attempts must not use a generator up
        if self._fused_optimizer:
            return ascend.fused_optimizer(kind)(parameters, **options)
        cls = getattr(torch.optim, kind)
        # Without a word torch_npu asks a card whether to use foreach, also where there is none.
        forms = {"npu": (), "cuda": ({"fused": True},), "cpu": ({"fused": True}, {"foreach": False})}[self.type]
        for form in forms:
            with contextlib.suppress(TypeError, RuntimeError):  # not in this torch, or not for this device
                sample = torch.zeros(1, device=self.torch_device, requires_grad=True)
                sample.grad = torch.zeros_like(sample)
                cls([sample], **form, **options).step()  # torch 2.1 says no only here
                return cls(parameters, **form, **options)
        return cls(parameters, **options)


def keep_freed_memory():
    """Have malloc keep what is freed: else each step gives its tensors back, and takes them again page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # <malloc.h>
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def _copy_stream(module):
    """Return a stream for copies from pinned memory, or None where the device or its torch has none."""
    try:
        stream = module.Stream()
        torch.zeros(1).pin_memory()
        return stream
    except (AttributeError, RuntimeError):
        return None


def _check_compiler(kind):
    """Return True where torch.compile works, as far as can be known without trying; raise UserError elsewhere."""
    if kind == "npu":
        raise UserError("--compile is for CUDA and CPU; on an NPU --jit-compile on compiles operators")
    if not hasattr(torch, "compile"):
        raise UserError("--compile: torch {} has no torch.compile, torch 2 has".format(torch.__version__))
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs triton: pip install triton")
    if kind == "cpu" and not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])):
        raise UserError("--compile needs a C++ compiler on a CPU, such as g++")
    return True


def fit_to_cpu(args):
    """Take the batch and the number of steps that the recipe has for a laptop; return lines that say so."""
    remarks = []
    for name in ("batch_size", "max_steps"):
        small = getattr(args, "cpu_" + name)
        if small is not None and small != getattr(args, name):
            remarks.append(
                "On this CPU {} is {}, in place of the recipe's {}; --{} chooses another".format(
                    name, small, getattr(args, name) or "whole epochs", name.replace("_", "-")
                )
            )
            setattr(args, name, small)
    return remarks


def processor_name():
    """Return the processor's model name."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def seed_host(seed):
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def describe_environment():
    """Return a dict of the versions that a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    module = sys.modules.get("torch_npu")
    if module is not None:
        found["torch_npu"] = module.__version__
    return found
