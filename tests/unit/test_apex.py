"""apex, as the versions of torch without mixed precision use it: which package it is, scale, skipped steps, states."""

import sys
import types

import pytest
import torch

from common import npu, precision
from common.data import Batch
from common.errors import UserError
from tests.helpers import ROOT

WHOLE = Batch(None, None, 1.0, 0.0, 1)  # a batch that is a step


@pytest.fixture
def ascends(monkeypatch):
    """The stand-in for Ascend's apex, for the time of a test."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "legacy" / "stand_ins"))
    amp, problem = npu.find_apex()
    assert problem is None
    yield amp
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def build(monkeypatch, weight, loss_scale, clip_grad=None):
    """Return a `Precision` as where torch has no autocast, with its optimizer."""
    monkeypatch.delattr(torch, "autocast")
    monkeypatch.setattr(precision, "_choose_dtype", lambda card, args: torch.float16)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    card = types.SimpleNamespace(type="npu", module=None)
    args = types.SimpleNamespace(amp=True, opt_level="O1", amp_dtype="auto", loss_scale=loss_scale, notices=[])
    args.evaluate, args.clip_grad, args.compile, args.torch_layers = False, clip_grad, None, False
    built = precision.Precision(card, args, torch.nn.Module(), optimizer)
    assert built.label == "float16 by apex, loss scale {}".format(loss_scale) and args.notices == []
    return built, optimizer


def test_only_a_package_with_amp_is_apex(monkeypatch, tmp_path):
    assert npu.find_apex() == (None, "apex is not installed")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    amp, problem = npu.find_apex()
    assert amp is None
    assert problem == "the apex in {}/apex is an unrelated package of that name and is not used".format(tmp_path)
    with pytest.raises(UserError, match="unrelated package"):
        npu.fused_optimizer("SGD")


def test_fused_optimizers_are_ascends(ascends):
    optimizer = npu.fused_optimizer("AdamW")([torch.zeros(1, requires_grad=True)], lr=0.1, betas=(0.9, 0.999))
    assert type(optimizer).__name__ == "NpuFusedAdamW"
    with pytest.raises(TypeError, match="fused"):  # as the fork's, it refuses what it does not know
        npu.fused_optimizer("SGD")([torch.zeros(1, requires_grad=True)], lr=0.1, fused=True)


@pytest.mark.parametrize("loss_scale, before, after", [
    ("dynamic", 2.0**16, 2.0**15), ("64", 64.0, 64.0), ("1048576", 2.0**20, 2.0**20),
])  # fmt: skip
def test_an_overflow_skips_the_step_and_halves_a_dynamic_scale_only(ascends, monkeypatch, loss_scale, before, after):
    weight = torch.nn.Parameter(torch.ones(3))
    built, optimizer = build(monkeypatch, weight, loss_scale)
    assert built.state_dict()["scale"] == before
    for factor, expected in ((1.0, 0.5), (float("inf"), 0.5), (1.0, 0.0)):
        built.step((weight * factor).sum(), optimizer, WHOLE)
        assert weight.tolist() == [expected] * 3
    assert built.state_dict() == {
        "scale": after, "_growth_tracker": 1, "skipped": 1,
    }  # fmt: skip


def test_apex_goes_on_with_the_scale_of_torchs_scaler(ascends, monkeypatch):
    built, _ = build(monkeypatch, torch.nn.Parameter(torch.ones(3)), "dynamic")
    built.load_state_dict(dict(torch.amp.GradScaler("cpu", init_scale=8.0).state_dict(), skipped=4))
    assert built.state_dict()["scale"] == 8.0 and built.skipped == 4


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_batches_of_a_step_are_added_up_and_an_overflow_in_any_of_them_skips_it(ascends, monkeypatch, bad):
    weight = torch.nn.Parameter(torch.ones(3))
    built, optimizer = build(monkeypatch, weight, "dynamic", clip_grad=0.5)
    for number, ends_step in enumerate([False, True, False, True]):
        factor = float("inf") if number == bad else 1.0
        built.step((weight * factor).sum(), optimizer, WHOLE._replace(weight=0.5, ends_step=ends_step))
    steps = 2 if bad is None else 1
    assert torch.allclose(weight, torch.full((3,), 1 - steps * 0.5 * 0.5 / 3**0.5)) and built.skipped == 2 - steps
