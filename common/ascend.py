"""What only Ascend cards need: finding torch_npu and its cards, how operators are run, scaler and fused optimizers."""

import os
import sys
import warnings

import torch

import common
from common import apex
from common.errors import UserError


def find():
    """Return `torch.npu`, or None where torch_npu is missing, cannot be used, or sees no card."""
    if common.NPU_PROBLEM:
        return None
    if not hasattr(torch, "npu"):
        try:
            import torch_npu  # noqa: F401
        except ImportError:
            return None
    # is_available() is True even when ASCEND_RT_VISIBLE_DEVICES hides all cards.
    return torch.npu if torch.npu.device_count() > 0 else None


def why_none():
    """Return why `find` finds none, with the cure."""
    if common.NPU_PROBLEM:
        return common.NPU_PROBLEM
    if not hasattr(torch, "npu"):
        release = torch.__version__.split("+")[0]
        return 'torch_npu is not installed for {}: pip install "torch_npu=={}.*"'.format(sys.executable, release)
    return "torch_npu sees no card (npu-smi info lists them{})".format(visible_devices())


def visible_devices():
    """Return a remark about ASCEND_RT_VISIBLE_DEVICES, or an empty string."""
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return "" if visible is None else "; ASCEND_RT_VISIBLE_DEVICES={} numbers those it names from 0".format(visible)


def set_up(npu, jit_compile):
    """Choose how operators are run, before the first tensor is on the card."""
    if jit_compile != "auto" and hasattr(npu, "set_compile_mode"):
        # The first generation compiles by default: minutes for each new shape.
        npu.set_compile_mode(jit_compile=jit_compile == "on")
    if hasattr(npu, "config"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is set is no news
            npu.config.allow_internal_format = False  # results must not depend on private memory layouts


def scaler(**options):
    """Return torch_npu's gradient scaler on a first-generation card, otherwise None: torch's own will do."""
    import torch_npu

    # First-generation cards flag an overflow per card: only this scaler tells the other ranks.
    has_inf = getattr(torch_npu.npu.utils, "is_support_inf_nan", bool)  # 1.8 knows the first generation alone
    return None if has_inf() else torch_npu.npu.amp.GradScaler(**options)


def fused_optimizer(kind):
    """Return `torch_npu.optim.NpuFused<kind>`, made safe: it keeps weights and gradients in buffers of its own."""
    torch_npu = sys.modules.get("torch_npu")
    if not hasattr(torch_npu, "optim"):  # torch 1.5 and 1.8
        return apex.fused_optimizer(kind)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # which it uses itself

    class Fused(getattr(torch_npu.optim, "NpuFused" + kind)):
        def zero_grad(self, set_to_none=False):
            if self.is_params_grads_combined:
                super().zero_grad()  # new gradients would not lie in its buffer
            else:  # super() would move the weights into it, which a backward pass that follows does not survive
                torch.optim.Optimizer.zero_grad(self)

        def load_state_dict(self, state_dict):
            if self.is_states_combined:
                raise UserError("--fused-optimizer: a state can only be loaded before the first step")
            super().load_state_dict(state_dict)
            for state in self.state.values():
                if "step" in state:
                    state["step"] = int(state["step"])  # torch's own optimizers have a tensor there

    return Fused
