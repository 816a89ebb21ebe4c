"""What only Ascend cards need: how torch_npu is set up and compiles, its fused optimizers, and apex (for torch 1.5)."""

import contextlib
import ctypes
import importlib
import inspect
import os
import sys
import warnings
from importlib.util import find_spec

import torch

import common
from common.errors import UserError


def find_problem():
    """Return why this process cannot use an NPU, with the cure; None where `torch.npu` has a card."""
    if common.NPU_PROBLEM:
        return common.NPU_PROBLEM
    if find_spec("torch_npu"):
        importlib.import_module("torch_npu")
    elif not hasattr(torch, "npu"):  # Ascend's torch 1.5 has it without torch_npu
        text = 'torch_npu is not installed for {}: pip install "torch_npu=={}.*"'
        return text.format(sys.executable, torch.__version__.split("+")[0])
    if torch.npu.device_count() == 0:  # is_available() is True even when ASCEND_RT_VISIBLE_DEVICES hides all cards
        text = "torch_npu sees no card (npu-smi info lists them; in rising order: ASCEND_RT_VISIBLE_DEVICES={})"
        return text.format(os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "(not set)"))
    return None


def check(args):
    """Raise UserError where this torch_npu cannot do what the options want."""
    for option, name in (("jit_compile", "set_compile_mode"), ("internal_format", "config")):
        if getattr(args, option) != "auto" and not hasattr(torch.npu, name):
            raise UserError("--{}: this torch_npu has no {}".format(option.replace("_", "-"), name))
    if args.compile and hasattr(torch, "compile"):
        compile_options(args.compile)


def set_up(backend, args):
    """Choose how `torch.npu` runs operators, before the first tensor is on the card; "auto" leaves it to the chip."""
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch_npu's own use of it
    with warnings.catch_warnings(), contextlib.suppress(AttributeError):  # torch 1.5 and 1.8 lack some of these
        warnings.simplefilter("ignore")  # each says that it was set
        if args.jit_compile != "auto":
            backend.set_compile_mode(jit_compile=args.jit_compile == "on")
        if args.internal_format != "auto":
            backend.config.allow_internal_format = args.internal_format == "on"
        backend.conv.allow_hf32 = backend.matmul.allow_hf32 = False  # newer chips would round factors of float32


def bind_cores(count):
    """Have torch_npu keep each of `count` ranks to the cores near its card, where the job has all cards of the host."""
    if count == torch.npu.device_count() and "ASCEND_RT_VISIBLE_DEVICES" not in os.environ:
        with contextlib.suppress(OSError):
            ctypes.CDLL("libdcmi.so")  # without it torch_npu cannot ask which cores are near a card, and fails
            os.environ.setdefault("CPU_AFFINITY_CONF", "1,npu_affine:1")
        os.environ.setdefault("CPU_AFFINITY_CONF", "1")


def is_first_generation(backend):
    """Return whether the chip (Ascend 910A) has no infinity and no bfloat16, and multiplies float32 in float16."""
    return not getattr(getattr(backend, "utils", None), "is_support_inf_nan", bool)()


def compile_options(mode):
    """Return the options of `torch.compile` for `--compile`; raise UserError where torch_npu has no compiler."""
    options, backends = {"mode": mode}, importlib.import_module("torch._dynamo").list_backends(exclude_tags=None)
    if not (find_spec("triton") and find_spec("triton.backends.ascend")):
        if "npugraphs" not in backends:
            raise UserError("--compile needs triton-ascend here; --jit-compile on compiles operators without it")
        options = {"backend": "npugraphs"}
    if options != {"mode": "default"} and os.environ.get("TASK_QUEUE_ENABLE") == "2":
        raise UserError("--compile records graphs, which TASK_QUEUE_ENABLE=2 forbids: export TASK_QUEUE_ENABLE=1")
    return options


def prefers_fused(backend, kind):
    """Return whether the fused optimizer `kind` gives torch's results in fewer kernels than torch's own."""
    has_own = hasattr(sys.modules.get("torch_npu"), "optim")
    return kind == "SGD" and has_own and is_first_generation(backend)  # newer chips have torch's foreach


def fused_optimizer(kind):
    """Return the class `NpuFused<kind>` of torch_npu or apex; raise UserError where there is neither."""
    torch_npu = sys.modules.get("torch_npu")
    if not hasattr(torch_npu, "optim"):  # torch 1.5 and 1.8
        _, problem = find_apex()
        if problem:
            raise UserError("--fused-optimizer: {}".format(problem))
        return getattr(importlib.import_module("apex.optimizers"), "NpuFused" + kind)

    class Fused(getattr(torch_npu.optim, "NpuFused" + kind)):  # it keeps weights and gradients in buffers of its own
        def zero_grad(self, set_to_none=False):
            if self.is_params_grads_combined:
                super().zero_grad()  # new gradients would not lie in its buffer
            else:  # super() would move the weights into it, which a backward pass that follows does not survive
                torch.optim.Optimizer.zero_grad(self)

    return Fused


def find_apex():
    """Return (`apex.amp`, None), or (None, why there is none)."""
    spec = find_spec("apex")
    if spec is None:
        return None, "apex is not installed"
    folder = spec.submodule_search_locations[0]
    if not os.path.isfile(os.path.join(folder, "amp", "frontend.py")):
        return None, "the apex in {} is an unrelated package of that name and is not used".format(folder)
    return importlib.import_module("apex.amp"), None


def initialize_apex(amp, model, optimizer, opt_level, scale):
    """Have apex change model and optimizer for `opt_level`; `scale`: a fixed loss scale (float), or None: dynamic."""
    # apex skips no step where the scale is fixed, so a fixed one is a dynamic one between equal bounds.
    options = {} if scale is None else {"min_loss_scale": scale, "max_loss_scale": scale}
    if "combine_grad" in inspect.signature(amp.initialize).parameters:  # Ascend's
        options["combine_grad"] = True
    amp.initialize(model, optimizer, opt_level=opt_level, loss_scale="dynamic", verbosity=0, **options)
    if scale is not None:  # apex begins at 65536 at the most
        amp.load_state_dict({"loss_scaler0": {"loss_scale": scale, "unskipped": 0}})
