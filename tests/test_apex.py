"""apex, as the versions of torch without mixed precision use it: which package it is, scale, skipped steps, states."""

import sys

import pytest
import torch

from common import apex
from common.errors import UserError
from tests.bundles import ROOT


@pytest.fixture
def ascends(monkeypatch):
    """The stand-in for Ascend's apex, for the time of a test."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "legacy" / "stand_ins"))
    amp, problem = apex.find()
    assert problem is None
    yield amp
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_only_a_package_with_amp_is_apex(monkeypatch, tmp_path):
    assert apex.find() == (None, "apex is not installed")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    amp, problem = apex.find()
    assert amp is None
    assert problem == "the apex in {}/apex is an unrelated package of that name and is not used".format(tmp_path)
    with pytest.raises(UserError, match="unrelated package"):
        apex.fused_optimizer("SGD")


def test_fused_optimizers_are_ascends(ascends):
    optimizer = apex.fused_optimizer("AdamW")([torch.zeros(1, requires_grad=True)], lr=0.1, betas=(0.9, 0.999))
    assert type(optimizer).__name__ == "NpuFusedAdamW"
    with pytest.raises(TypeError, match="fused"):  # as the fork's, it refuses what it does not know
        apex.fused_optimizer("SGD")([torch.zeros(1, requires_grad=True)], lr=0.1, fused=True)


@pytest.mark.parametrize("scale, start", [(None, 2.0**16), (64.0, 64.0)])
def test_steps_overflow_and_states(ascends, scale, start):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = apex.Scaler(ascends, torch.nn.Module(), optimizer, "O1", scale)
    for factor, expected in ((1.0, 0.5), (float("inf"), 0.5), (1.0, 0.0)):
        optimizer.zero_grad()
        scaler.step((weight * factor).sum(), optimizer)
        assert weight.tolist() == [expected] * 3
    assert scaler.skipped == 1
    state = scaler.state_dict()
    assert state["scale"] == start / 2 and state["_growth_tracker"] == 1
    torchs = torch.amp.GradScaler("cpu")
    torchs.load_state_dict(state)
    assert torchs.get_scale() == start / 2 and torchs.state_dict() == state
    assert (torchs.get_growth_interval() < 2**31 - 1) == (scale is None)  # a fixed scale never grows
    scaler.load_state_dict(dict(state, scale=8.0, skipped=4))
    assert scaler.state_dict()["scale"] == 8.0 and scaler.skipped == 4
