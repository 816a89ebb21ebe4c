"""SPNASNet-100 against timm: the same keys, initial weights, logits and gradients."""

import pytest
import torch
from torch.nn import functional as F

from common.transforms import import_torchvision
from tests.helpers import fill_, images, imported

import_torchvision()  # timm imports torchvision
timm = pytest.importorskip("timm")
efficientnet_init_weights = pytest.importorskip("timm.models._efficientnet_builder").efficientnet_init_weights

with imported("SPNASNet_100") as models:
    pass


def _shapes(model):
    return [(key, tuple(value.shape), value.dtype) for key, value in model.state_dict().items()]


def _batch_norms(model):
    return [
        (name, m.eps, m.momentum)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
    ]


def test_same_keys_shapes_and_batch_norms():
    ours, theirs = models.spnasnet_100(), timm.create_model("spnasnet_100")
    assert models.__all__ == ["spnasnet_100"]
    assert _shapes(ours) == _shapes(theirs)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert sum(p.numel() for p in ours.parameters()) == 4421616
    assert _batch_norms(ours) == _batch_norms(theirs)
    assert {eps for _, eps, _ in _batch_norms(ours)} == {1e-5}


def test_same_initial_weights_for_the_same_seed():
    ours, theirs = models.spnasnet_100(), timm.create_model("spnasnet_100")
    # The seed is set after the construction, for timm's draws numbers for a layer that it throws away.
    torch.manual_seed(7)
    ours.init_weights()
    torch.manual_seed(7)
    efficientnet_init_weights(theirs)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("size, count", [(224, 2), (97, 1)])
def test_same_logits(size, count):
    x = images(count, size)
    ours, theirs = (
        fill_(models.spnasnet_100().double()).eval(),
        fill_(timm.create_model("spnasnet_100").double()).eval(),
    )
    with torch.no_grad():
        logits, expected = ours(x), theirs(x)
    assert 0.1 < expected.abs().max() < 1e3  # a filler that kills the signal would make all networks equal
    assert (logits - expected).abs().max() < 1e-8


def _step(model, x, targets):
    model.train()
    loss = F.cross_entropy(model(x), targets)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


def test_same_gradients_and_running_statistics():
    x, targets = images(4, 96), torch.tensor([0, 99, 500, 999])
    loss, grads, buffers = _step(fill_(models.spnasnet_100().double()), x, targets)
    expected_loss, expected_grads, expected_buffers = _step(
        fill_(timm.create_model("spnasnet_100").double()), x, targets
    )
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    for name, expected in expected_grads.items():
        # A bias whose shift the next BatchNorm takes away has a gradient of 0, but for rounding.
        assert (grads[name] - expected).norm() <= 1e-8 * expected.norm() + 1e-12, name
    assert sum(1 for expected in expected_grads.values() if expected.norm() > 1e-6) > 150
    for name, expected in expected_buffers.items():
        assert (buffers[name] - expected).abs().max() <= 1e-8, name


def test_number_of_classes():
    model = models.spnasnet_100(num_classes=10).eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    with pytest.raises(ValueError, match="num_classes must be at least 1, not 0"):
        models.spnasnet_100(num_classes=0)


def test_bf16_autocast_trains():
    model = models.spnasnet_100(num_classes=10)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images(2, 64).float()), torch.tensor([1, 2]))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
