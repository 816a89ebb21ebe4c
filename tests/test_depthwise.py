"""The faster depthwise gradients are torch's own, and the one flag switches them off."""

import copy

import pytest
import torch

from common import depthwise
from tests.bundles import imported


@pytest.mark.parametrize(
    "kernel, stride, side", [(5, 1, 14), (5, 2, 15), (5, 2, 28), (7, 1, 11), (7, 2, 16), (7, 2, 21)]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_equal_torchs(kernel, stride, side, dtype, tolerance):
    torch.manual_seed(0)
    images = torch.randn(3, 24, side, side).to(memory_format=torch.channels_last)
    weight = torch.randn(24, 1, kernel, kernel)
    padding = (kernel // 2, kernel // 2)
    found, expected = [], []
    for gradients, kind in ((found, dtype), (expected, torch.float64)):
        x, w = (t.to(dtype).to(kind).requires_grad_() for t in (images, weight))
        if gradients is found:
            y = depthwise._DepthwiseFunction.apply(x, w, (stride, stride), padding)
        else:
            y = torch.nn.functional.conv2d(x, w, None, stride, padding, groups=24)
        gradients += torch.autograd.grad(y, (x, w), torch.cos(torch.arange(y.numel())).view(y.shape).to(kind))
    for ours, reference in zip(found, expected):
        assert ours.dtype == dtype
        assert (ours.double() - reference).norm() / reference.norm() < tolerance


def test_a_model_keeps_its_state_and_its_function():
    with imported("MnasNet") as models:
        model = models.mnasnet0_5(10).eval()
    fast = copy.deepcopy(model)
    assert depthwise.speed_up(fast) == 10  # 3 + 3 + 4 blocks with 5x5 kernels
    assert list(fast.state_dict()) == list(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(fast(images), model(images))


def test_training_in_bfloat16_follows_torchs_own():
    torch.manual_seed(0)
    with imported("MnasNet") as models:
        model = models.mnasnet0_5(10, dropout=0.0)
    images, targets = torch.randn(16, 3, 64, 64), torch.arange(16) % 10
    gradients = []
    for change in (lambda m: 0, depthwise.speed_up):
        changed = copy.deepcopy(model)
        change(changed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(changed(images), targets)
        loss.backward()
        gradients.append(changed.classifier[1].weight.grad.flatten())
        last_large = changed.layers[12][3].layers[3].weight.grad.flatten()
        gradients.append(last_large)
    assert torch.equal(gradients[0], gradients[2])  # the forward pass is the same
    cosine = torch.nn.functional.cosine_similarity(gradients[1], gradients[3], dim=0).item()
    assert cosine > 0.999
