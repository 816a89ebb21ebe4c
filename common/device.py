"""The device of this process: which card it is, seeds, memory layout, the form of the optimizer, a profile."""

import contextlib
import csv
import ctypes
import glob
import itertools
import math
import os
import platform
import random
import re
import resource
import shutil
import sys
from collections import Counter
from importlib.util import find_spec

import numpy as np
import torch

import common
from common import distributed, npu
from common.errors import UserError


def choose_type(name, notices):
    """Return "npu", "cuda" or "cpu" for the value of `--device`; raise UserError where it is not there.

    A CPU that takes the place of hidden NPUs is a line more of `notices`.
    """
    if name in ("npu", "auto"):
        problem = npu.find_problem()
        if problem is None:
            return "npu"
        if name == "npu":
            raise UserError("--device npu: {}".format(problem))
    if name != "cpu" and torch.cuda.is_available():
        return "cuda"
    if name in ("gpu", "cuda"):
        reason = "sees no CUDA card (nvidia-smi lists them)" if torch.version.cuda else "is built for CPUs alone"
        raise UserError("--device {}: this torch {}".format(name, reason))
    if name == "auto" and common.NPU_PROBLEM:  # who has installed torch_npu does not want to wait for a CPU
        raise UserError("{}. --device cpu trains without it".format(problem))
    if name == "auto" and find_spec("torch_npu"):
        notices.append("[Warning] {}: this is a CPU".format(problem))
    return "cpu"


def check(args):
    """Raise UserError where the device of type `args.device` has too few cards or cannot do what other options want."""
    kind = args.device
    if kind == "npu":
        npu.check(args)
    elif (args.jit_compile, args.internal_format) != ("auto", "auto"):
        raise UserError("--jit-compile and --internal-format are the NPU's; this device is {}".format(kind))
    profile = getattr(getattr(torch, "profiler", None), "profile", None)  # torch 1.8's, without start, takes minutes
    for option, place, name in (("compile", torch, "compile"), ("profile", profile, "start")):
        if getattr(args, option) and not hasattr(place, name):
            raise UserError("--{}: torch {} does not have it".format(option, torch.__version__))
    if kind == "cuda" and args.accumulate > 1 and args.compile not in (None, "default"):
        raise UserError("--compile {}: its graphs overwrite the gradients of --accumulate".format(args.compile))
    compiler = {"cuda": find_spec("triton"), "cpu": shutil.which(os.environ.get("CXX", "g++"))}.get(kind, True)
    if args.compile and not compiler:
        raise UserError("--compile needs a C++ compiler on a CPU (g++ or $CXX), on CUDA triton")
    last, count = max(distributed.card_ids(args)), math.inf if kind == "cpu" else getattr(torch, kind).device_count()
    if last >= count:  # the same on all ranks: the first one says it
        text = "card {} was asked for, this machine has {} (0 to {}); {}_VISIBLE_DEVICES numbers those it names from 0"
        raise UserError(text.format(last, count, count - 1, "ASCEND_RT" if kind == "npu" else "CUDA"))


class Device:
    """One process's card: `type` is "npu", "cuda" or "cpu", `module` is `torch.npu`, `torch.cuda` or None.

    `channels_last`: whether images and weights have NHWC memory, where convolutions are faster (an error on NPU).
    """

    def __init__(self, args):
        """Take this rank's card, join the ranks, seed everything; raise UserError where one of them fails."""
        self.type, self.ranks, self._copies = args.device, distributed.Ranks(), None
        self.cores = len(os.sched_getaffinity(0))  # of all ranks of this node; torch_npu may bind this one to some
        self.module = None if self.type == "cpu" else getattr(torch, self.type)
        self.channels_last, self._args = self.type != "npu" and args.memory_format == "auto", args
        if self.module is None:
            self.torch_device, self.name = torch.device("cpu"), processor()[0]
            keep_freed_memory()
            self._share_cores()
        else:
            self.torch_device = torch.device(self.type, distributed.card_ids(args)[self.ranks.local_rank])
            self.module.set_device(self.torch_device)
            if self.type == "npu":
                npu.set_up(self.module, args)
            self.name = getattr(self.module, "get_device_name", str)(self.torch_device)  # not in torch 1.5 for NPUs
            with contextlib.suppress(AttributeError, RuntimeError):  # old versions: no streams, or no pinned memory
                torch.zeros(1).pin_memory()
                self._copies = self.module.Stream()
        if hasattr(torch.backends.cuda, "matmul"):  # float32 is float32; mixed precision leaves no product to TF32
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        # cuDNN tries its algorithms: the first step takes long, the others less.
        torch.backends.cudnn.benchmark = not (args.evaluate or args.export or args.predict)
        self.ranks.join(args.dist_backend or {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[self.type])
        seed_everything(args.seed)

    def _share_cores(self):
        """Give each rank of a CPU job its own cores, where there are enough."""
        world, rank = self.ranks.local_world_size, self.ranks.local_rank
        if world > 1:
            cores = sorted(os.sched_getaffinity(0))
            share = len(cores) // world
            os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share] or cores)
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

    def prepare(self, item):
        """Return `item` (a model, or a batch of images) on the device, in the layout that its convolutions like."""
        item = item.to(self.torch_device)
        return item.to(memory_format=torch.channels_last) if self.channels_last else item

    def upload(self, *tensors):
        """Start to copy `tensors` in memory to the device, beside its other work; return a function for the copies.

        The device waits for the copies when that function is called, not before.
        """
        if self._copies is None:
            copies = [tensor.to(self.torch_device, copy=True) for tensor in tensors]
            return lambda: copies
        with self.module.stream(self._copies):
            copies = [tensor.pin_memory().to(self.torch_device, non_blocking=True) for tensor in tensors]

        def receive():
            stream = self.module.current_stream()
            stream.wait_stream(self._copies)
            for copy in copies:
                copy.record_stream(stream)  # its memory is not given away before what is queued has read it
            return copies

        return receive

    def parallel(self, model):
        """Return `model` wrapped for several ranks and compiled, for training; all ranks get rank 0's weights."""
        if self.ranks.world_size > 1:
            device_ids = None if self.module is None else [self.torch_device.index]
            network, model = model, torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
            model.broadcast_buffers = False  # as an argument torch 2.13 warns of it, and older versions need it
            # After its first backward pass torch packs the gradients in another order, in which sums of more than two
            # ranks round in another way: that pass is not the first step, which may be in the middle of a run.
            model.module = torch.nn.Module()
            # Of a product a gradient has the strides of its weight, for which torch looks.
            model.module.forward = lambda _: sum((weight * weight.detach()).sum() for weight in network.parameters())
            model(torch.zeros(1)).backward()
            model.module = network
            network.zero_grad()
        if not self._args.compile:
            return model
        options = npu.compile_options if self.type == "npu" else lambda mode: {"mode": mode}
        return torch.compile(model, **options(self._args.compile))

    def optimizer(self, kind, params, **options):
        """Return the optimizer `kind` of torch ("SGD", ...) of `params` in the fastest form that has its results.

        `--fused-optimizer` may ask for another form; raises UserError where there is none.
        """
        wanted, params = self._args.fused_optimizer, list(params)  # two attempts would use a generator up
        if self.type == "npu":
            if wanted == "on" or (wanted == "auto" and npu.prefers_fused(self.module, kind)):
                return npu.fused_optimizer(kind)(params, **options)
        elif wanted != "off":
            # An optimizer writes its options into the groups, also when it then refuses them.
            groups = [dict(item) if isinstance(item, dict) else item for item in params]
            try:
                optimizer = getattr(torch.optim, kind)(groups, fused=True, **options)
                if kind == "SGD":
                    _begin_momentum(optimizer)
                    optimizer.register_load_state_dict_post_hook(_begin_momentum)
                return optimizer
            except (TypeError, RuntimeError) as error:  # not in this torch, or not for this device
                if wanted == "on":
                    raise UserError("--fused-optimizer on: {}".format(str(error).splitlines()[0])) from None
        return getattr(torch.optim, kind)(params, **options)

    def profile(self, batches, end, steps, args, log):
        """Yield `batches`, and record the `steps` before step number `end` of the run: a trace, and lines of `log`."""
        batches, is_npu = iter(batches), self.type == "npu"
        folder = args.log_dir or args.output_dir or os.getcwd()
        yield from itertools.islice(batches, (end - steps) * args.accumulate)
        profiler = sys.modules["torch_npu" if is_npu else "torch"].profiler
        recording = contextlib.ExitStack()
        run = recording.enter_context(profiler.profile(on_trace_ready=profiler.tensorboard_trace_handler(folder)))
        yield from itertools.islice(batches, steps * args.accumulate)
        with log.paused():
            recording.close()
            pattern = "*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json" if is_npu else "*.pt.trace.json"
            traces = glob.glob(os.path.join(glob.escape(folder), pattern))
            if traces:
                path, device, host = max(traces, key=os.path.getmtime), Counter(), Counter()
                for name, on_device, on_host in _npu_operators(path) if is_npu else _operators(run):
                    device[name] += float(on_device)
                    host[name] += float(on_host)
                times = device if any(device.values()) else host  # as on a CPU
                shares = [(name, 100 * time / sum(times.values())) for name, time in times.most_common(5)]
                log.line("profile of {} steps: https://ui.perfetto.dev opens {}".format(steps, path))
                log.line("largest operators: " + ", ".join("{} {:.1f} %".format(*share) for share in shares))
            else:
                log.line("[Warning] --profile: the profiler has written nothing to {}".format(folder))
        yield from batches


def _begin_momentum(optimizer):
    """Set momentums that are missing to 0: torch's fused SGD keeps what was in memory if it skips a step."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if group["momentum"] and param.requires_grad:
                optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


def _operators(run):
    """Return (name, us on the device, us on the host) of what torch's profiler has recorded."""
    events = [event for event in run.key_averages() if "CUDA" not in str(getattr(event, "device_type", ""))]  # kernels
    old = "self_cuda_time_total"  # as torch before 2.4 calls it
    return [(e.key, getattr(e, "self_device_time_total", getattr(e, old, 0)), e.self_cpu_time_total) for e in events]


def _npu_operators(trace):
    with open(os.path.join(os.path.dirname(trace), "operator_details.csv"), encoding="utf-8") as file:
        names = ("Name", "Device Self Duration(us)", "Host Self Duration(us)")
        return [[row[name] for name in names] for row in csv.DictReader(file)]


def keep_freed_memory():
    """Have malloc keep what is freed: else each step gives its tensors back, and takes them again page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # <malloc.h>
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


def processor():
    """Return the processor's name, and whether it multiplies bfloat16 in hardware: elsewhere float32 is faster."""
    text = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        text = file.read(8192)  # the first core
    name = re.search("^model name.*: (.+)", text, re.MULTILINE)  # not on ARM
    return name.group(1) if name else platform.machine(), bool(re.search(r"\b(avx512_|amx_)?bf16\b", text))


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
