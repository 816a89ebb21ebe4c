"""Mixed precision: torch's own where it has one for the device, else apex's."""

import contextlib
import io
import math

import torch

from common import apex, ascend, batchnorm, convolution
from common.errors import UserError

DYNAMIC = "dynamic"


def has_fast_bfloat16():
    """Return whether the processor multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _fixed_scale(loss_scale):
    """Return the value of `--loss-scale` as a float, None for "dynamic"."""
    if loss_scale == DYNAMIC:
        return None
    try:
        scale = float(loss_scale)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise UserError("--loss-scale {!r} is neither a number above 0 nor dynamic".format(loss_scale))
    return scale


class Precision:
    """Mixed precision: autocast for the forward pass, a scaled backward pass, and steps skipped on overflow.

    Attributes:
        label: what runs, for the log: "float32", "bfloat16", "float16, loss scale dynamic", ...
    """

    def __init__(self, device, args, model, optimizer):
        """Choose what device and torch can do; apex changes `model` and `optimizer`, `amp` on a CPU changes `model`.

        Args:
            device: the `common.device.Device`; what it cannot do is added to its remarks.
            args: `amp`, `opt_level`, `amp_dtype`, `loss_scale`, `stock_layers`.
            model: the model, on the device, before it is made parallel.
            optimizer: what `device.optimizer` returned.

        Raises:
            UserError: the device has not what was asked for.
        """
        self._device = device
        self._scaler = self._apex = self._overflows = None
        wanted = args.amp and args.opt_level != "O0"
        self._dtype = self._choose_dtype(args) if wanted else None
        fused_by_apex = type(optimizer).__module__.startswith("apex.")
        if wanted and (fused_by_apex or not self._is_native):
            amp, problem = apex.find()
            if problem:
                text = "[Warning] torch {} has no mixed precision for this device, and {}: float32"
                device.remarks.append(text.format(torch.__version__, problem))
            elif self._dtype is not None:
                self._apex = apex.Scaler(amp, model, optimizer, args.opt_level, _fixed_scale(args.loss_scale))
            if self._apex is None:
                self._dtype = None
        elif self._dtype == torch.float16:
            self._scaler = self._build_scaler(_fixed_scale(args.loss_scale))
        elif wanted and device.type == "cpu" and not args.stock_layers:
            self._take_faster_layers(model)
        if fused_by_apex and self._apex is None:
            raise UserError("--fused-optimizer: apex has it only for --amp with --opt-level O1 or O2")
        self.label = str(self._dtype or torch.float32).replace("torch.", "")
        if self._dtype == torch.float16:
            self.label += "{}, loss scale {}".format(" by apex" if self._apex else "", args.loss_scale)

    def _take_faster_layers(self, model):
        if not (self._device.likes_channels_last and hasattr(torch, "get_autocast_dtype")):
            return  # they work on channels_last memory, and with this autocast of torch
        if batchnorm.speed_up(model) is None:
            self._device.remarks.append("no C compiler (cc) with OpenMP is here: what needs it is torch's, and slower")
        convolution.speed_up(model, self._dtype or torch.float32)

    @property
    def _is_native(self):
        return hasattr(torch, "autocast") or hasattr(self._device._module, "amp")

    @property
    def skipped(self):
        """Number of steps that were skipped because a gradient overflowed; reading it waits for the device."""
        if self._apex is not None:
            return self._apex.skipped
        return 0 if self._overflows is None else int(self._overflows.item())

    def _choose_dtype(self, args):
        device = self._device
        if args.amp_dtype == "bfloat16" and not hasattr(torch, "autocast"):
            raise UserError("--amp-dtype bfloat16: torch {} is too old for it".format(torch.__version__))
        if device.type == "cpu":
            if args.amp_dtype == "float16":
                raise UserError("--amp-dtype float16 is for NPU and CUDA; a CPU takes bfloat16")
            fast = hasattr(torch, "autocast") and has_fast_bfloat16()
            return torch.bfloat16 if args.amp_dtype == "bfloat16" or fast else None
        if args.amp_dtype == "bfloat16":
            supported = getattr(device._module, "is_bf16_supported", lambda: False)()
            if not supported:
                raise UserError("--amp-dtype bfloat16: {} has none; use float16".format(device.name))
            return torch.bfloat16
        return torch.float16

    def _build_scaler(self, scale):
        # A fixed scale still has to skip overflowed steps, so it is a dynamic one that never grows.
        options = {} if scale is None else {"init_scale": scale, "growth_interval": 2**31 - 1}
        own = ascend.scaler(**options) if self._device.type == "npu" else None
        if own is not None:
            return own
        if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
            return torch.amp.GradScaler(self._device.type, **options)
        return self._device._module.amp.GradScaler(**options)

    def autocast(self):
        """Return the context of a forward pass and its loss."""
        if self._dtype is None or self._apex is not None:
            return contextlib.nullcontext()
        if not hasattr(torch, "autocast"):
            return self._device._module.amp.autocast()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def step(self, loss, optimizer):
        """Do the backward pass of `loss` (a scalar) and one step of `optimizer`, unless a gradient overflowed."""
        optimizer.zero_grad()
        if self._apex is not None:
            self._apex.step(loss, optimizer)
            return
        if self._scaler is None:
            loss.backward()
            optimizer.step()
            return
        self._scaler.scale(loss).backward()
        with self._silence():
            self._scaler.step(optimizer)
            self._count_overflow(optimizer)
            self._scaler.update()

    def _silence(self):
        """torch_npu's scaler prints what it does, on every rank; the log has the number of skipped steps."""
        prints = type(self._scaler).__module__.startswith("torch_npu")
        return contextlib.redirect_stdout(io.StringIO()) if prints else contextlib.nullcontext()

    def _count_overflow(self, optimizer):
        # On the device: asking whether the step was skipped would wait for it.
        (found,) = self._scaler._found_inf_per_device(optimizer).values()
        self._overflows = found.sign() if self._overflows is None else self._overflows + found.sign()

    def state_dict(self):
        """Return what a checkpoint must keep: the loss scale, its counters, and the number of skipped steps."""
        scaler = self._apex or self._scaler
        return dict(scaler.state_dict(), skipped=self.skipped) if scaler is not None else {}

    def load_state_dict(self, state):
        """Take the state of another run; a state of another precision is left aside."""
        if not state:
            return
        if self._apex is not None:
            self._apex.load_state_dict(state)
        elif self._scaler is not None:
            self._scaler.load_state_dict(dict(state, dynamic=state.get("dynamic", True)))
            self._overflows = torch.tensor(float(state.get("skipped", 0)), device=self._device.torch_device)
