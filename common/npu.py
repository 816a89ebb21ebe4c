"""What only Ascend cards need: torch_npu, its gradient scaler and fused optimizers, and apex (for torch 1.5)."""

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
    try:
        import torch_npu  # noqa: F401
    except ImportError:
        if not hasattr(torch, "npu"):  # Ascend's torch 1.5 has it without torch_npu
            text = 'torch_npu is not installed for {}: pip install "torch_npu=={}.*"'
            return text.format(sys.executable, torch.__version__.split("+")[0])
    if torch.npu.device_count() == 0:  # is_available() is True even when ASCEND_RT_VISIBLE_DEVICES hides all cards
        return "torch_npu sees no card (npu-smi info lists them{})".format(visible_devices())
    return None


def visible_devices():
    """Return what an error message must say about ASCEND_RT_VISIBLE_DEVICES, or an empty string."""
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return "" if visible is None else "; ASCEND_RT_VISIBLE_DEVICES={} numbers those it names from 0".format(visible)


def set_up(backend, jit_compile):
    """Choose how `torch.npu` runs operators ("auto", "on", "off": compiled), before the first tensor is on the card."""
    if jit_compile != "auto" and hasattr(backend, "set_compile_mode"):
        # The first generation compiles by default: minutes for each new shape.
        backend.set_compile_mode(jit_compile=jit_compile == "on")
    if hasattr(backend, "config"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it only says that it was set
            backend.config.allow_internal_format = False  # results must not depend on private memory layouts
    if hasattr(backend, "conv"):  # newer chips would round the factors of float32 products (HF32)
        backend.conv.allow_hf32 = False
        backend.matmul.allow_hf32 = False


def scaler_class():
    """Return torch_npu's gradient scaler on a first-generation card, otherwise None: torch's own will do."""
    import torch_npu

    # First-generation cards flag an overflow per card: only this scaler tells the other ranks.
    has_inf = getattr(torch_npu.npu.utils, "is_support_inf_nan", bool)  # 1.8 knows the first generation alone
    return None if has_inf() else torch_npu.npu.amp.GradScaler


def fused_optimizer(kind):
    """Return the class `NpuFused<kind>` of torch_npu or apex; raise UserError where there is none."""
    torch_npu = sys.modules.get("torch_npu")
    if not hasattr(torch_npu, "optim"):  # torch 1.5 and 1.8
        amp, problem = find_apex()
        optimizers = amp and importlib.import_module("apex.optimizers")
        if not hasattr(optimizers, "NpuFused" + kind):
            raise UserError("--fused-optimizer: {}".format(problem or "this apex is not Ascend's"))
        return getattr(optimizers, "NpuFused" + kind)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch_npu's own use of it

    class Fused(getattr(torch_npu.optim, "NpuFused" + kind)):  # it keeps weights and gradients in buffers of its own
        def zero_grad(self, set_to_none=False):
            if self.is_params_grads_combined:
                super().zero_grad()  # new gradients would not lie in its buffer
            else:  # super() would move the weights into it, which a backward pass that follows does not survive
                torch.optim.Optimizer.zero_grad(self)

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            for state in self.state.values():
                if "step" in state:
                    state["step"] = int(state["step"])  # torch's own optimizers have a tensor there

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
    try:
        amp.initialize(model, optimizer, opt_level=opt_level, loss_scale="dynamic", verbosity=0, **options)
    except ModuleNotFoundError as error:
        raise UserError("apex has no {0}: it is built with --{0}".format(error.name)) from None
    if scale is not None:  # apex begins at 65536 at the most
        amp.load_state_dict({"loss_scaler0": {"loss_scale": scale, "unskipped": 0}})
