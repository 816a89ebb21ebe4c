"""The device of this process: which card it is, how fast arithmetic is set up on it, mixed precision, optimizers.

Everything that differs between NPU, CUDA and CPU, or between versions of torch, is decided here; the bundles name none
of them. Versions are never compared: a feature is tried, or looked for with `hasattr`.
"""

import contextlib
import os
import platform
import random
import sys

import numpy as np
import torch

from common import ranks as ranks_module
from common.errors import UserError

_DYNAMIC = "dynamic"


def add_arguments(parser, amp=False, opt_level="O1", loss_scale=_DYNAMIC):
    """Declare the options of device, ranks and precision; the recipe gives the defaults of the precision."""
    group = parser.add_argument_group("device and precision")
    group.add_argument("--device", default="auto", choices=["auto", "npu", "gpu", "cuda", "cpu"])
    group.add_argument("--seed", type=int, default=0, help="one seed gives one run: order, crops, weights")
    group.add_argument("--amp", action="store_true", default=amp, help="mixed precision, unless --opt-level is O0")
    group.add_argument("--opt-level", default=opt_level, choices=["O0", "O1", "O2"], help="O0: float32 throughout")
    group.add_argument("--amp-dtype", default="auto", choices=["auto", "float16", "bfloat16"])
    group.add_argument("--loss-scale", "--loss_scale", default=loss_scale, metavar="N|dynamic")
    group.add_argument("--cpu-batch-size", type=int, metavar="N", help="replaces --batch-size on a CPU")
    group.add_argument("--cpu-max-steps", type=int, metavar="N", help="replaces --max-steps on a CPU")
    group.add_argument("--fused-optimizer", action="store_true", help="the NPU's own fused optimizer")
    ranks_module.add_arguments(parser)


def _npu_module():
    """Return `torch.npu`, or None where torch_npu is missing or sees no card."""
    if not hasattr(torch, "npu"):
        try:
            import torch_npu  # noqa: F401
        except ImportError:
            return None
    return torch.npu if hasattr(torch, "npu") and torch.npu.is_available() else None


def choose_type(name):
    """Return "npu", "cuda" or "cpu" for the value of `--device`.

    Raises:
        UserError: the device that was asked for is not there.
    """
    if name == "cpu":
        return "cpu"
    if name == "npu" or name == "auto":
        if _npu_module() is not None:
            return "npu"
        if name == "npu":
            raise UserError("--device npu: torch_npu is not installed here or sees no card (npu-smi info lists them)")
    if torch.cuda.is_available():
        return "cuda"
    if name in ("gpu", "cuda"):
        raise UserError("--device {}: this torch sees no CUDA card (nvidia-smi lists them)".format(name))
    return "cpu"


class Device:
    """One process's card and its place among the ranks.

    Attributes:
        type: "npu", "cuda" or "cpu".
        torch_device: the `torch.device` to put tensors on.
        ranks: the `common.ranks.Ranks` of this process.
        name: what the card or processor calls itself.
        remarks: lines for the log: what was chosen for the user.
    """

    def __init__(self, args):
        """Take this rank's card, join the ranks and seed everything.

        Raises:
            UserError: the card does not exist, or the ranks cannot meet.
        """
        self.type = choose_type(args.device)
        self.remarks = _fit_to_cpu(args) if self.type == "cpu" else []
        self.ranks = ranks_module.Ranks()
        self.seed = args.seed
        ids = ranks_module.card_ids(args)
        if len(ids) != self.ranks.local_world_size:
            ids = list(range(self.ranks.local_world_size))  # torchrun said how many there are
        self._module = {"npu": _npu_module, "cuda": lambda: torch.cuda, "cpu": lambda: None}[self.type]()
        if self._module is None:
            self.torch_device = torch.device("cpu")
            self._share_cores()
        else:
            card = ids[self.ranks.local_rank]
            count = self._module.device_count()
            if card >= count:
                raise UserError("card {} was asked for, this machine has {} (0 to {})".format(card, count, count - 1))
            self.torch_device = torch.device(self.type, card)
            self._module.set_device(self.torch_device)
        self.ranks.join(args.dist_backend or {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[self.type])
        seed_host(args.seed)

    @property
    def name(self):
        """The model name of the card or processor."""
        if self._module is not None:
            return self._module.get_device_name(self.torch_device)
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
        """Return the most memory that tensors took on the card so far, in GiB (0 on CPU)."""
        if self._module is None or not hasattr(self._module, "max_memory_allocated"):
            return 0.0
        return self._module.max_memory_allocated() / 2**30

    def seed_step(self, step):
        """Make what follows random as a function of (seed, rank, step) alone, so that a resumed run repeats it."""
        torch.manual_seed((self.seed * 1000003 + step) * 4096 + self.ranks.rank)

    @property
    def likes_channels_last(self):
        """Whether convolutions are faster on NHWC memory; on NPU that layout is an error."""
        return self.type != "npu"

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
        return item.to(memory_format=torch.channels_last) if self.likes_channels_last else item

    def parallel(self, model):
        """Return `model` wrapped for several ranks; BatchNorm buffers stay local (see `Ranks.broadcast_buffers`)."""
        if self.ranks.world_size == 1:
            return model
        device_ids = None if self._module is None else [self.torch_device.index]
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)

    def optimizer(self, kind, parameters, **options):
        """Return the optimizer `kind` ("SGD" or "AdamW") in the fastest form that gives torch's own result.

        Args:
            kind: the name of a class of `torch.optim`.
            parameters: tensors or parameter groups.
            options: its arguments (lr, momentum, weight_decay, ...).
        """
        cls = getattr(torch.optim, kind)
        if self.type != "npu":
            with contextlib.suppress(TypeError, RuntimeError):  # no fused form in this torch, or not for this device
                return cls(parameters, fused=True, **options)
        elif self.fused_optimizer:
            raise UserError("--fused-optimizer: not supported yet")
        return cls(parameters, **options)

    fused_optimizer = False


def _fit_to_cpu(args):
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


def has_fast_bfloat16():
    """Return whether the processor multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


class Precision:
    """Mixed precision: autocast for the forward pass, a scaled backward pass, and steps skipped on overflow.

    Attributes:
        label: what runs, for the log: "float32", "bfloat16", "float16, loss scale dynamic", ...
        skipped: number of optimizer steps that were skipped because a gradient overflowed.
    """

    def __init__(self, device, args):
        self._device = device
        self._dtype = self._choose_dtype(device, args)
        self._scaler = None
        self.skipped = 0
        self.label = str(self._dtype or torch.float32).replace("torch.", "")
        if self._dtype == torch.float16:
            self._scaler = self._build_scaler(args.loss_scale)
            self.label += ", loss scale {}".format(args.loss_scale)

    @staticmethod
    def _choose_dtype(device, args):
        if not args.amp or args.opt_level == "O0" or not hasattr(torch, "autocast"):
            return None
        if device.type == "cpu":
            if args.amp_dtype == "float16":
                raise UserError("--amp-dtype float16 is for NPU and CUDA; a CPU takes bfloat16")
            return torch.bfloat16 if args.amp_dtype == "bfloat16" or has_fast_bfloat16() else None
        if args.amp_dtype == "bfloat16":
            supported = getattr(device._module, "is_bf16_supported", lambda: False)()
            if not supported:
                raise UserError("--amp-dtype bfloat16: {} has none; use float16".format(device.name))
            return torch.bfloat16
        return torch.float16

    def _build_scaler(self, loss_scale):
        if loss_scale == _DYNAMIC:
            options = {}
        else:
            try:
                # A fixed scale still has to skip overflowed steps, so it is a dynamic one that never grows.
                options = {"init_scale": float(loss_scale), "growth_interval": 2**31 - 1}
            except ValueError:
                raise UserError("--loss-scale {!r} is neither a number nor dynamic".format(loss_scale)) from None
        if self._device.type == "npu" and not torch.npu.utils.is_support_inf_nan():
            # First-generation cards flag an overflow per card: only this scaler tells the other ranks.
            import torch_npu

            return torch_npu.npu.amp.GradScaler(**options)
        if hasattr(torch.amp, "GradScaler"):
            return torch.amp.GradScaler(self._device.type, **options)
        return self._device._module.amp.GradScaler(**options)

    def autocast(self):
        """Return the context of a forward pass and its loss."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def step(self, loss, optimizer):
        """Do the backward pass of `loss` (a scalar) and one step of `optimizer`, unless a gradient overflowed."""
        optimizer.zero_grad()
        if self._scaler is None:
            loss.backward()
            optimizer.step()
            return
        self._scaler.scale(loss).backward()
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self):
        """Return what a checkpoint must keep: the loss scale and its counters."""
        return self._scaler.state_dict() if self._scaler is not None else {}

    def load_state_dict(self, state):
        """Take the state of another run; a state of another precision is left aside."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(dict(state, dynamic=state.get("dynamic", True)))


def describe_environment():
    """Return a dict of the versions that a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    module = sys.modules.get("torch_npu")
    if module is not None:
        found["torch_npu"] = module.__version__
    return found
