"""Mixed precision: torch's own where it has one for the card, else apex's."""

import contextlib
import io

import torch

from common import npu
from common.cpu_layers import convert_layers
from common.device import has_fast_bfloat16
from common.errors import UserError


class Precision:
    """Mixed precision: autocast for the forward pass, a scaled backward pass, and steps skipped on overflow.

    Attributes:
        label: what runs, for the log: "float32", "bfloat16", "float16, loss scale dynamic", ...
    """

    def __init__(self, card, args, model, optimizer):
        """Choose what `card` can do, or raise UserError; it may change `model`, which is not parallel yet."""
        self._card, self._scaler, self._amp, self._skipped = card, None, None, 0
        self._fixed_scale = None if args.loss_scale == "dynamic" else float(args.loss_scale)
        wanted = args.amp and args.opt_level != "O0"
        self._dtype = _choose_dtype(card, args) if wanted else None
        is_native = hasattr(torch, "autocast") or hasattr(card.module, "amp")
        optimizer_by_apex = type(optimizer).__module__.startswith("apex.")
        if wanted and (optimizer_by_apex or not is_native):
            amp, problem = npu.find_apex()
            if problem:
                text = "[Warning] torch {} has no mixed precision for this device, and {}: float32"
                card.notices.append(text.format(torch.__version__, problem))
                self._dtype = None
            elif self._dtype is not None:
                npu.initialize_apex(amp, model, optimizer, args.opt_level, self._fixed_scale)
                self._amp = amp
        elif self._dtype == torch.float16:
            self._scaler = _build_scaler(card, {} if self._fixed_scale is None else {"init_scale": self._fixed_scale})
        elif wanted and card.type == "cpu" and card.channels_last and not args.torch_layers:
            convert_layers(model)
        if optimizer_by_apex and self._amp is None:
            raise UserError("--fused-optimizer: apex has it only for --amp with --opt-level O1 or O2")
        self.label = str(self._dtype or torch.float32).replace("torch.", "")
        if self._dtype == torch.float16:
            self.label += "{}, loss scale {}".format(" by apex" if self._amp else "", args.loss_scale)

    @property
    def skipped(self):
        """Number of steps that were skipped because a gradient overflowed; reading it waits for the device."""
        return int(self._skipped)

    def autocast(self):
        """Return the context of a forward pass and its loss."""
        if self._dtype is None or self._amp is not None:
            return contextlib.nullcontext()
        if not hasattr(torch, "autocast"):
            return self._card.module.amp.autocast()
        return torch.autocast(self._card.type, dtype=self._dtype)

    def step(self, loss, optimizer, weight=1.0):
        """Do the backward pass of `loss` (a scalar) times `weight` (a float, the batch's) and a step of `optimizer`."""
        optimizer.zero_grad()
        loss = loss * weight
        if self._scaler is not None:
            self._skipped = self._skipped + self._scaled_step(self._scaler, loss, optimizer)
        elif self._amp is not None:
            step = optimizer.step
            with self._amp.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            self._skipped += optimizer.step != step  # to skip a step, apex replaces the method for one call
            optimizer.step()
        else:
            loss.backward()
            optimizer.step()

    def _scaled_step(self, scaler, loss, optimizer):
        # Return whether the step was skipped as a tensor on the card: reading the scale as a number would wait for it.
        # torch_npu's scaler waits anyway, its `scale` would clear the card's overflow flag too early, and it prints.
        is_npus, one = type(scaler).__module__.startswith("torch_npu"), torch.ones_like(loss)
        read_scale = scaler.get_scale if is_npus else lambda: scaler.scale(one)
        scaler.scale(loss).backward()
        with contextlib.redirect_stdout(io.StringIO()) if is_npus else contextlib.nullcontext():
            before = read_scale()
            scaler.step(optimizer)
            scaler.update()
            is_skipped = read_scale() < before
            if self._fixed_scale is not None:
                scaler.update(self._fixed_scale)
        return is_skipped

    def state_dict(self):
        """Return what a checkpoint must keep: the loss scale, its counters, and the number of skipped steps."""
        if self._scaler is None and self._amp is None:
            return {}
        state = (self._scaler or self._amp).state_dict()
        if self._amp is not None:
            (state,) = state.values()  # of its only loss scaler
            state = {"scale": state["loss_scale"], "_growth_tracker": state["unskipped"]}
        return dict(state, dynamic=self._fixed_scale is None, skipped=self.skipped)

    def load_state_dict(self, state):
        """Take the state of another run: the scale only from dynamic to dynamic, since options say a fixed one."""
        own = self.state_dict()
        if not state or not own:
            return
        self._skipped = state.get("skipped", 0)
        was_fixed = not state.get("dynamic", True) or state.get("growth_interval") == 2**31 - 1  # in older files
        if self._fixed_scale is not None or was_fixed:
            return
        scale, steps = state["scale"], state["_growth_tracker"]
        if self._amp is not None:
            self._amp.load_state_dict({"loss_scaler0": {"loss_scale": scale, "unskipped": steps}})
        else:
            self._scaler.load_state_dict(dict(own, scale=scale, _growth_tracker=steps))


def _choose_dtype(card, args):
    if card.type == "cpu":
        if args.amp_dtype == "float16":
            raise UserError("--amp-dtype float16 is for NPU and CUDA; a CPU takes bfloat16")
        wanted = args.amp_dtype == "bfloat16" or has_fast_bfloat16()
        return torch.bfloat16 if wanted and hasattr(torch, "autocast") else None
    if args.amp_dtype != "bfloat16":
        return torch.float16
    if not getattr(card.module, "is_bf16_supported", bool)():
        raise UserError("--amp-dtype bfloat16: {} has none; use float16".format(card.name))
    return torch.bfloat16


def _build_scaler(card, options):
    of_npu = npu.scaler_class() if card.type == "npu" else None
    if of_npu is None and hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(card.type, **options)
    return (of_npu or card.module.amp.GradScaler)(**options)
