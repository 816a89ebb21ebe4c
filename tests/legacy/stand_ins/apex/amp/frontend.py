"""Loss scaling as Ascend's apex does it, in float32; what it is called with goes to the file $APEX_CALLS."""

import contextlib
import json
import os
import types

import torch

_state = types.SimpleNamespace()


def _record(**call):
    if "APEX_CALLS" in os.environ:
        with open(os.environ["APEX_CALLS"], "a") as file:
            file.write(json.dumps(call) + "\n")


def initialize(
    models,
    optimizers=None,
    enabled=True,
    opt_level="O1",
    cast_model_type=None,
    patch_torch_functions=None,
    keep_batchnorm_fp32=None,
    master_weights=None,
    loss_scale=None,
    cast_model_outputs=None,
    num_losses=1,
    verbosity=1,
    dynamic_init_scale=2.0**16,
    scale_growth_factor=2.0,
    scale_backoff_factor=0.5,
    scale_window=2000,
    min_loss_scale=None,
    max_loss_scale=2.0**24,
    combine_grad=None,
    combine_ddp=None,
    ddp_replica_count=4,
    user_cast_preferred=None,
    check_combined_tensors=None,
):
    if opt_level not in ("O0", "O1", "O2", "O3"):
        raise RuntimeError("Unexpected optimization level " + str(opt_level))
    if isinstance(models, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError("Incoming model is an instance of DistributedDataParallel")
    _state.dynamic = loss_scale == "dynamic"
    _state.scale = min(max_loss_scale, dynamic_init_scale) if _state.dynamic else float(loss_scale)
    _state.min_scale, _state.max_scale, _state.window = min_loss_scale or 0.0, max_loss_scale, scale_window
    _state.unskipped = _state.steps = 0
    _state.is_patched = False
    optimizers._amp_stash = True
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    _record(opt_level=opt_level, loss_scale=loss_scale, min_loss_scale=min_loss_scale, max_loss_scale=max_loss_scale,
            combine_grad=combine_grad, optimizer=type(optimizers).__name__, ranks=ranks)  # fmt: skip
    return models, optimizers


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False):
    yield loss.float() * _state.scale
    gradients = [p.grad for group in optimizers.param_groups for p in group["params"] if p.grad is not None]
    for gradient in gradients:
        gradient.div_(_state.scale)
    _state.steps += 1
    overflow = os.environ.get("APEX_OVERFLOW_STEP") == str(_state.steps)
    overflow = overflow or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    if overflow and _state.dynamic:
        _state.scale, _state.unskipped = max(_state.min_scale, _state.scale / 2), 0
        if _state.is_patched:  # by an earlier backward pass of the same step
            return
        step, _state.is_patched = optimizers.step, True

        def skip(closure=None):
            optimizers.step, _state.is_patched = step, False

        optimizers.step = skip
        return
    _state.unskipped += 1
    if _state.unskipped == _state.window and _state.dynamic:
        _state.scale, _state.unskipped = min(_state.max_scale, _state.scale * 2), 0


def state_dict(destination=None):
    return {"loss_scaler0": {"loss_scale": _state.scale, "unskipped": _state.unskipped}}


def load_state_dict(state_dict):
    (mine,) = state_dict.values()
    _state.scale, _state.unskipped = mine["loss_scale"], mine["unskipped"]
    _record(loaded=mine["loss_scale"])
