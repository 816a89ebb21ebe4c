"""Loss scale, skipped steps and their states with torch's own scaler; what O0 and evaluation compute in."""

import types

import pytest
import torch

from common import precision
from common.data import Batch
from common.errors import UserError

CARD = types.SimpleNamespace(type="cpu", module=None, torch_device=torch.device("cpu"), channels_last=True)
WHOLE = Batch(None, None, 1.0, 0.0, 1)  # a batch that is a step


def arguments(**values):
    options = {"amp": True, "opt_level": "O1", "amp_dtype": "auto", "loss_scale": "dynamic", "torch_layers": False}
    return types.SimpleNamespace(**dict(options, evaluate=False, clip_grad=None, compile=None, **values))


@pytest.fixture
def build(monkeypatch):
    """A function that returns a `Precision` in float16, which no option gives a CPU, a weight and its optimizer."""

    def build(loss_scale, clip_grad=None, **options):
        monkeypatch.setattr(precision, "_choose_dtype", lambda card, args: torch.float16)
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.5, **options)
        args = arguments()
        args.loss_scale, args.clip_grad = loss_scale, clip_grad
        return precision.Precision(CARD, args, torch.nn.Module(), optimizer), weight, optimizer

    return build


def overflow(built, weight, optimizer, times):
    for _ in range(times):
        built.step((weight * float("inf")).sum(), optimizer, WHOLE)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loss_scale, after", [("dynamic", 2.0**13), ("64", 64.0), ("0.5", 0.5)])
def test_overflowed_steps_are_skipped_and_counted_and_a_fixed_scale_stays(build, loss_scale, after, fused):
    built, weight, optimizer = build(loss_scale, fused=fused)
    assert built.label == "float16, loss scale " + loss_scale
    built.step(weight.sum(), optimizer, WHOLE)
    overflow(built, weight, optimizer, 3)
    assert weight.tolist() == [0.5] * 3 and built.skipped == 3
    assert built.state_dict()["scale"] == after
    built.step(weight.sum(), optimizer, WHOLE)
    assert weight.tolist() == [0.0] * 3 and built.skipped == 3
    assert built.state_dict()["scale"] == after


def test_a_fixed_scale_does_not_grow(build):
    built, weight, optimizer = build("64")
    for _ in range(2001):
        built.step(weight.sum() * 0, optimizer, WHOLE)
    assert built.state_dict()["scale"] == 64 and built.skipped == 0


# Of the run that goes on, of the file, whose dynamic scale has fallen by one overflow: the new run's scale.
STATES = [("dynamic", "dynamic", 2.0**15), ("128", "dynamic", 128.0), ("dynamic", "64", 64.0), ("128", "64", 128.0)]


@pytest.mark.parametrize("loss_scale, of_file, scale", STATES)
def test_a_scale_is_taken_over_where_the_options_fix_none(build, loss_scale, of_file, scale):
    saved, weight, optimizer = build(of_file)
    overflow(saved, weight, optimizer, 1)
    built, weight, optimizer = build(loss_scale)
    built.load_state_dict(saved.state_dict())
    assert built.state_dict()["scale"] == scale and built.skipped == 1
    built.step(weight.sum(), optimizer, WHOLE)
    assert built.state_dict()["scale"] == scale and weight.tolist() == [0.5] * 3


def test_torchs_scaler_goes_on_with_the_scale_of_apex(build):
    built, _, _ = build("dynamic")
    built.load_state_dict({"scale": 8.0, "_growth_tracker": 3, "skipped": 2})
    assert (built.state_dict()["scale"], built.state_dict()["_growth_tracker"], built.skipped) == (8.0, 3, 2)


def test_a_state_of_another_precision_is_left_aside(build):
    built, _, _ = build("dynamic")
    built.load_state_dict({})
    assert built.state_dict()["scale"] == 2.0**16 and built.skipped == 0


def test_the_weight_of_a_batch_scales_its_gradient():
    weight = torch.nn.Parameter(torch.ones(3))
    args = arguments()
    args.amp = False
    optimizer = torch.optim.SGD([weight], lr=1.0)
    built = precision.Precision(CARD, args, torch.nn.Module(), optimizer)
    assert built.label == "float32" and built.state_dict() == {} and built.skipped == 0
    built.step(weight.sum(), optimizer, WHOLE._replace(weight=0.75))
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
        args = arguments()
        args.amp, args.opt_level, args.torch_layers = amp, level, torch_layers
        precision.Precision(CARD, args, model, torch.optim.SGD(model.parameters(), lr=1.0))
        assert type(model[0]).__name__ == expected


def test_what_a_cpu_cannot_do_is_one_line():
    args = arguments()
    args.amp_dtype = "float16"
    with pytest.raises(UserError, match="--amp-dtype float16 is for NPU and CUDA; a CPU takes bfloat16"):
        precision.Precision(CARD, args, torch.nn.Module(), None)


def parts(weights, ends):
    return [WHOLE._replace(weight=weight, ends_step=end) for weight, end in zip(weights, ends)]


@pytest.mark.parametrize("loss_scale", [None, "dynamic", "64"])
@pytest.mark.parametrize("clip_grad", [None, 0.5, 1e9])
def test_a_step_of_several_batches_is_one_of_their_weighted_sum(build, loss_scale, clip_grad):
    if loss_scale is None:
        weight, args = torch.nn.Parameter(torch.ones(3)), arguments()
        args.amp, args.clip_grad = False, clip_grad
        optimizer = torch.optim.SGD([weight], lr=0.5)
        built = precision.Precision(CARD, args, torch.nn.Module(), optimizer)
    else:
        built, weight, optimizer = build(loss_scale, clip_grad)
    slopes = torch.tensor([1.0, 2.0, 2.0])  # of norm 3
    for batch in parts((0.5, 0.25, 0.25), (False, False, True)):
        assert weight.tolist() == [1.0] * 3
        built.step((weight * slopes).sum(), optimizer, batch)
    norm = min(3.0, clip_grad or 3.0)
    assert torch.allclose(weight, 1 - 0.5 * slopes * norm / 3, atol=1e-6)
    built.step((weight * 0).sum(), optimizer, WHOLE)  # nothing of the gradient is left
    assert torch.allclose(weight, 1 - 0.5 * slopes * norm / 3, atol=1e-6)


@pytest.mark.parametrize("clip_grad", [None, 0.5])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_overflow_in_any_batch_of_a_step_skips_that_step_alone(build, bad, clip_grad):
    built, weight, optimizer = build("dynamic", clip_grad)
    for number, batch in enumerate(parts([1 / 3] * 6, (False, False, True) * 2)):
        built.step((weight * (float("inf") if number == bad else 1.0)).sum(), optimizer, batch)
    change = 0.5 / 3**0.5 if clip_grad else 1.0
    assert torch.allclose(weight, torch.full((3,), 1 - 0.5 * change), atol=1e-6) and built.skipped == 1
    assert built.state_dict()["scale"] == 2.0**15


def test_an_evaluation_is_float32_and_changes_no_layer():
    model, args = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1)), arguments()
    args.evaluate = True
    built = precision.Precision(CARD, args, model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert (built.label, type(model[0])) == ("float32", torch.nn.Conv2d)


def test_on_cuda_layers_are_replaced_where_no_compiler_chooses_their_layout():
    """1x1 convolutions alone: a depthwise one would take the CPU's form."""
    card = types.SimpleNamespace(type="cuda", module=torch.cuda, channels_last=True)
    for changes, expected in (
        ({}, "PointwiseConv2d"),
        ({"compile": "default"}, "Conv2d"),
        ({"torch_layers": True}, "Conv2d"),
        ({"amp": False}, "Conv2d"),
    ):
        depthwise, args = torch.nn.Conv2d(8, 8, 3, groups=8, bias=False), arguments()
        model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), depthwise)
        vars(args).update(changes, amp_dtype="float16")
        precision.Precision(card, args, model, torch.optim.SGD(model.parameters(), lr=1.0))
        assert [type(layer).__name__ for layer in model] == [expected, "Conv2d"]


@pytest.mark.parametrize(
    "sees_infinity, label", [(True, "float32"), (False, "float32 (this chip multiplies in float16)")]
)
def test_the_label_says_what_a_first_generation_card_does_with_float32(sees_infinity, label):
    utils = types.SimpleNamespace(is_support_inf_nan=lambda: sees_infinity)
    card = types.SimpleNamespace(type="npu", module=types.SimpleNamespace(utils=utils), channels_last=False)
    args = arguments()
    args.opt_level = "O0"
    assert precision.Precision(card, args, torch.nn.Module(), None).label == label
