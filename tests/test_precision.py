"""Loss scale, skipped steps and their states with torch's own scaler; what O0 and evaluation compute in."""

import types

import pytest
import torch

from common import precision
from common.errors import UserError

CARD = types.SimpleNamespace(type="cpu", module=None, notices=[], torch_device=torch.device("cpu"), channels_last=True)
NEVER = 2**31 - 1  # the growth interval of a fixed scale in the files of earlier versions


@pytest.fixture
def build(monkeypatch):
    """A function that returns a `Precision` in float16, which no option gives a CPU, a weight and its optimizer."""

    def build(loss_scale, **options):
        monkeypatch.setattr(precision, "_choose_dtype", lambda card, args: torch.float16)
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.5, **options)
        args = types.SimpleNamespace(amp=True, opt_level="O1", amp_dtype="auto", loss_scale=loss_scale)
        return precision.Precision(CARD, args, torch.nn.Module(), optimizer), weight, optimizer

    return build


def overflow(built, weight, optimizer, times):
    for _ in range(times):
        built.step((weight * float("inf")).sum(), optimizer)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loss_scale, after", [("dynamic", 2.0**13), ("64", 64.0), ("0.5", 0.5)])
def test_overflowed_steps_are_skipped_and_counted_and_a_fixed_scale_stays(build, loss_scale, after, fused):
    built, weight, optimizer = build(loss_scale, fused=fused)
    assert built.label == "float16, loss scale " + loss_scale
    built.step(weight.sum(), optimizer)
    overflow(built, weight, optimizer, 3)
    assert weight.tolist() == [0.5] * 3 and built.skipped == 3
    assert built.state_dict()["scale"] == after
    built.step(weight.sum(), optimizer)
    assert weight.tolist() == [0.0] * 3 and built.skipped == 3
    assert built.state_dict()["scale"] == after


def test_a_fixed_scale_does_not_grow(build):
    built, weight, optimizer = build("64")
    for _ in range(2001):
        built.step(weight.sum() * 0, optimizer)
    assert built.state_dict()["scale"] == 64 and built.skipped == 0


# Of the run that goes on, of the file: its scale after one overflow, whether the new run takes it.
STATES = [("dynamic", "dynamic", 2.0**15), ("128", "dynamic", 128.0), ("dynamic", "64", 2.0**16), ("128", "64", 128.0)]


@pytest.mark.parametrize("loss_scale, of_file, scale", STATES)
def test_a_scale_is_taken_over_only_from_dynamic_to_dynamic(build, loss_scale, of_file, scale):
    saved, weight, optimizer = build(of_file)
    overflow(saved, weight, optimizer, 1)
    built, weight, optimizer = build(loss_scale)
    built.load_state_dict(saved.state_dict())
    assert built.state_dict()["scale"] == scale and built.skipped == 1
    built.step(weight.sum(), optimizer)
    assert built.state_dict()["scale"] == scale and weight.tolist() == [0.5] * 3


@pytest.mark.parametrize("interval, scale", [(2000, 32.0), (NEVER, 2.0**16)])
def test_files_of_earlier_versions_are_read(build, interval, scale):
    """They say by the growth interval whether the scale was fixed; torch_npu's scaler wrote `dynamic` for both."""
    state = {"scale": 32.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": interval}
    state.update(_growth_tracker=5, skipped=7, dynamic=True)
    built, weight, optimizer = build("dynamic")
    built.load_state_dict(state)
    assert built.state_dict()["scale"] == scale and built.skipped == 7
    for _ in range(1995):
        built.step(weight.sum() * 0, optimizer)
    assert built.state_dict()["scale"] == (64.0 if interval == 2000 else scale)  # 5 steps are counted already


def test_torchs_scaler_goes_on_with_the_scale_of_apex(build):
    built, _, _ = build("dynamic")
    built.load_state_dict({"scale": 8.0, "_growth_tracker": 3, "dynamic": True, "skipped": 2})
    assert (built.state_dict()["scale"], built.state_dict()["_growth_tracker"], built.skipped) == (8.0, 3, 2)


def test_a_state_of_another_precision_is_left_aside(build):
    built, _, _ = build("dynamic")
    built.load_state_dict({})
    assert built.state_dict()["scale"] == 2.0**16 and built.skipped == 0


def test_the_weight_of_a_batch_scales_its_gradient():
    weight = torch.nn.Parameter(torch.ones(3))
    args = types.SimpleNamespace(amp=False, opt_level="O1", amp_dtype="auto", loss_scale="dynamic")
    optimizer = torch.optim.SGD([weight], lr=1.0)
    built = precision.Precision(CARD, args, torch.nn.Module(), optimizer)
    assert built.label == "float32" and built.state_dict() == {} and built.skipped == 0
    built.step(weight.sum(), optimizer, 0.75)
    assert weight.tolist() == [0.25] * 3
    built.load_state_dict({"scale": 32.0, "skipped": 3})
    assert built.skipped == 0


def test_layers_are_replaced_on_a_cpu_with_amp_unless_torchs_are_wanted():
    for amp, level, torch_layers, expected in (
        (True, "O1", False, "PointwiseConv2d"),
        (True, "O1", True, "Conv2d"),
        (True, "O0", False, "Conv2d"),
        (False, "O1", False, "Conv2d"),
    ):
        model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1))
        args = types.SimpleNamespace(amp=amp, opt_level=level, amp_dtype="auto", loss_scale="dynamic")
        args.torch_layers = torch_layers
        precision.Precision(CARD, args, model, torch.optim.SGD(model.parameters(), lr=1.0))
        assert type(model[0]).__name__ == expected


def test_what_a_cpu_cannot_do_is_one_line():
    args = types.SimpleNamespace(amp=True, opt_level="O1", amp_dtype="float16", loss_scale="dynamic")
    with pytest.raises(UserError, match="--amp-dtype float16 is for NPU and CUDA; a CPU takes bfloat16"):
        precision.Precision(CARD, args, torch.nn.Module(), None)
