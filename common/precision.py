"""Mixed precision, torch's own where it has one for the card, else apex's; steps of several batches, and clipping."""

import contextlib
import io

import torch

from common import npu
from common.cpu_layers import convert_layers
from common.device import processor
from common.errors import UserError


class Precision:
    """Autocast for the forward pass, scaled backward passes, and steps, skipped on overflow.

    `label` says what runs; `skipped` counts the steps left out so far, as a tensor where reading it waits for the card.
    """

    def __init__(self, card, args, model, optimizer):
        """Choose what `card` can do, or raise UserError; it may change `model`, which is not parallel yet."""
        self._card, self._scaler, self._amp, self.skipped, self._clip_grad = card, None, None, 0, args.clip_grad
        self._fixed_scale = None if args.loss_scale == "dynamic" else float(args.loss_scale)
        wanted = args.amp and args.opt_level != "O0" and not args.evaluate
        optimizer_by_apex = type(optimizer).__module__.startswith("apex.")
        if optimizer_by_apex and not (wanted or args.evaluate):
            raise UserError("--fused-optimizer: apex has it only for --amp with --opt-level O1 or O2")
        self._dtype = _choose_dtype(card, args) if wanted else None
        is_native = hasattr(torch, "autocast") or hasattr(card.module, "amp")
        if wanted and (optimizer_by_apex or not is_native):
            amp, problem = npu.find_apex()
            if problem:
                text = "[Warning] torch {} has no mixed precision for this device, and {}: float32"
                args.notices.append(text.format(torch.__version__, problem))
                self._dtype = None
            elif self._dtype is not None:
                npu.initialize_apex(amp, model, optimizer, args.opt_level, self._fixed_scale)
                self._amp = amp
        elif self._dtype == torch.float16:
            self._scaler = _build_scaler(card, self._fixed_scale or 2.0**16)
        chooses_layouts = args.torch_layers or (card.type == "cuda" and args.compile)
        if wanted and self._amp is None and card.channels_last and not chooses_layouts:
            convert_layers(model, card.type)
        self.label = str(self._dtype or torch.float32).replace("torch.", "")
        if self._dtype == torch.float16:
            self.label += "{}, loss scale {}".format(" by apex" if self._amp else "", args.loss_scale)
        elif card.type == "npu" and npu.is_first_generation(card.module):
            self.label += " (this chip multiplies in float16)"

    @contextlib.contextmanager
    def autocast(self, model, batch):
        """Enter what the forward pass of `model` on `batch` (a `data.Batch`) and its loss run in."""
        with contextlib.ExitStack() as stack:
            if not batch.ends_step and hasattr(model, "no_sync"):  # the ranks add their gradients up once a step
                stack.enter_context(model.no_sync())
            if self._dtype is not None and self._amp is None:
                is_new = hasattr(torch, "autocast")
                options = {"device_type": self._card.type, "dtype": self._dtype} if is_new else {}
                stack.enter_context((torch if is_new else self._card.module.amp).autocast(**options))
            yield

    def step(self, loss, optimizer, batch):
        """Do the backward pass of `loss` (the mean of `batch`), and a step of `optimizer` where `batch` ends one."""
        loss = loss * batch.weight
        if self._scaler is not None:
            self._scaler.scale(loss).backward()
            if batch.ends_step:
                self.skipped = self.skipped + self._scaled_step(self._scaler, torch.ones_like(loss), optimizer)
        else:
            step, scaling = optimizer.step, contextlib.nullcontext(loss)
            if self._amp is not None:
                scaling = self._amp.scale_loss(loss, optimizer)
            with scaling as scaled_loss:
                scaled_loss.backward()
            self.skipped += optimizer.step != step  # to skip a step, apex replaces the method until its next call
            if batch.ends_step:
                self._clip(optimizer)
                optimizer.step()
        if batch.ends_step:
            optimizer.zero_grad()

    def _clip(self, optimizer):
        if self._clip_grad:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._clip_grad)

    def _scaled_step(self, scaler, one, optimizer):
        # Return whether the step was skipped as a tensor on the card: reading the scale as a number would wait for it.
        # torch_npu's scaler waits anyway, its `scale` would clear the card's overflow flag too early, and it prints.
        is_npus = type(scaler).__module__.startswith("torch_npu")
        read_scale = scaler.get_scale if is_npus else lambda: scaler.scale(one)
        before = read_scale()
        with contextlib.redirect_stdout(io.StringIO()):
            if self._clip_grad:
                scaler.unscale_(optimizer)
                self._clip(optimizer)
            scaler.step(optimizer)
            scaler.update()
        is_skipped = read_scale() < before
        if self._fixed_scale is not None:
            scaler.update(self._fixed_scale)
        return is_skipped

    def state_dict(self):
        """Return what a checkpoint must keep: the loss scale, its counters, and the number of skipped steps."""
        if self._amp is not None:
            (state,) = self._amp.state_dict().values()  # of its only loss scaler
            state = {"scale": state["loss_scale"], "_growth_tracker": state["unskipped"]}
        elif self._scaler is not None:
            state = self._scaler.state_dict()
        else:
            return {}
        return dict(state, skipped=int(self.skipped))

    def load_state_dict(self, state):
        """Take the state of another run, but not its scale where the options fix one."""
        own = self.state_dict()
        if not state or not own:
            return
        self.skipped = state.get("skipped", 0)
        if self._fixed_scale is not None:
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
        wanted = args.amp_dtype == "bfloat16" or processor()[1]
        return torch.bfloat16 if wanted and hasattr(torch, "autocast") else None
    if args.amp_dtype != "bfloat16":
        return torch.float16
    if not getattr(card.module, "is_bf16_supported", bool)():
        raise UserError("--amp-dtype bfloat16: {} has none; use float16".format(card.name))
    return torch.bfloat16


def _build_scaler(card, scale):
    # First-generation NPUs (torch 1.8 knows no others) flag an overflow per card: torch_npu's scaler tells all ranks.
    sees_infinity = card.type != "npu" or not npu.is_first_generation(card.module)
    if sees_infinity and hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(card.type, init_scale=scale)
    return card.module.amp.GradScaler(init_scale=scale)
