"""Mixed precision by Ascend's or NVIDIA's apex, for a torch that has none of its own (1.5)."""

import importlib
import inspect
import os
from importlib.util import find_spec

from common.errors import UserError

_NEVER = 2**31 - 1


def find():
    """Return (`apex.amp`, None), or (None, why there is none)."""
    spec = find_spec("apex")
    if spec is None:
        return None, "apex is not installed"
    folder = spec.submodule_search_locations[0]
    if not os.path.isfile(os.path.join(folder, "amp", "frontend.py")):
        return None, "the apex in {} is an unrelated package of that name and is not used".format(folder)
    return importlib.import_module("apex.amp"), None


def fused_optimizer(kind):
    """Return `apex.optimizers.NpuFused<kind>`, which steps only after `Scaler` was set up.

    Raises:
        UserError: it is not there.
    """
    amp, problem = find()
    optimizers = amp and importlib.import_module("apex.optimizers")
    if not hasattr(optimizers, "NpuFused" + kind):
        raise UserError("--fused-optimizer: {}".format(problem or "this apex is not Ascend's"))
    return getattr(optimizers, "NpuFused" + kind)


class Scaler:
    """apex, set up for one model and its optimizer.

    Attributes:
        skipped: number of steps that were skipped because a gradient overflowed.
    """

    def __init__(self, amp, model, optimizer, opt_level, scale=None):
        """Let apex change `model` and `optimizer` in place; the model is on its card, the ranks have met.

        Args:
            amp: what `find` returned.
            model: with O2 its weights become float16, and the optimizer gets float32 ones.
            optimizer: its `step` will skip what overflowed.
            opt_level: "O1" or "O2".
            scale: fixed loss scale (float); None: dynamic.
        """
        self._amp, self._fixed, self.skipped = amp, scale is not None, 0
        # A fixed scale would not skip overflowed steps, so it is a dynamic one that never grows.
        options = {"max_loss_scale": scale} if self._fixed else {}
        if "combine_grad" in inspect.signature(amp.initialize).parameters:  # Ascend's
            options["combine_grad"] = True
        try:
            amp.initialize(model, optimizer, opt_level=opt_level, loss_scale="dynamic", verbosity=0, **options)
        except ModuleNotFoundError as error:
            raise UserError("apex has no {0}: it is built with --{0}".format(error.name)) from None

    def _state(self):
        return self._amp.state_dict()["loss_scaler0"]

    def step(self, loss, optimizer):
        """Do the backward pass of `loss` (a scalar) and one step of `optimizer`, unless a gradient overflowed."""
        before = self._state()["loss_scale"]
        with self._amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        self.skipped += self._state()["loss_scale"] < before
        optimizer.step()  # of which apex has made nothing where the step is to be skipped

    def state_dict(self):
        """Return the state in the form of torch's own `GradScaler`."""
        state = self._state()
        return {
            "scale": state["loss_scale"],
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": _NEVER if self._fixed else 2000,
            "_growth_tracker": state["unskipped"],
        }

    def load_state_dict(self, state):
        """Take the state of a `GradScaler`."""
        mine = {"loss_scale": state["scale"], "unskipped": state["_growth_tracker"]}
        self._amp.load_state_dict({"loss_scaler0": mine})
        self.skipped = state.get("skipped", 0)
