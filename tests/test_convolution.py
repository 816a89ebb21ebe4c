"""The faster convolutions and their gradients are torch's own."""

import copy
import shutil

import pytest
import torch

from common import convolution
from tests.bundles import imported


@pytest.mark.parametrize(
    "kernel, stride, side, padding",
    [(k, s, side, k // 2) for k in (3, 5, 7) for s in (1, 2) for side in (1, 2, 3, 4, 7, 14, 21)]
    + [(5, 2, 16, 1), (7, 2, 21, 2), (3, 2, 8, 0)],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_depthwise_gradients_equal_torchs(kernel, stride, side, padding, dtype, tolerance):
    torch.manual_seed(0)
    images = torch.randn(3, 24, side, side).to(memory_format=torch.channels_last)
    weight = torch.randn(24, 1, kernel, kernel)
    found, expected = [], []
    for gradients, kind in ((found, dtype), (expected, torch.float64)):
        x, w = (t.to(dtype).to(kind).requires_grad_() for t in (images, weight))
        if gradients is found:
            y = convolution._DepthwiseFunction.apply(x, w, (stride, stride), (padding, padding))
        else:
            y = torch.nn.functional.conv2d(x, w, None, stride, padding, groups=24)
        gradients += torch.autograd.grad(y, (x, w), torch.cos(torch.arange(y.numel())).view(y.shape).to(kind))
    for ours, reference in zip(found, expected):
        assert ours.dtype == dtype and ours.shape == reference.shape
        assert (ours.double() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [5, 24, 58])
@pytest.mark.parametrize("kernel, stride", [(kernel, stride) for kernel in (3, 5, 7) for stride in (1, 2)])
def test_gradients_in_float32_equal_torchs(kernel, stride, channels, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    for height, width, padding in [(side, side, kernel // 2) for side in (1, 2, 4, 7, 21)] + [(9, 16, 1), (16, 9, 2)]:
        stock = torch.nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
        fast = copy.deepcopy(stock)
        assert convolution.speed_up(fast, torch.float32) == 1 and type(fast) is convolution.FloatDepthwiseConv2d
        images, results = torch.randn(4, channels, height, width).to(memory_format=torch.channels_last), []
        for layer, dtype in ((stock.double(), torch.float64), (fast, torch.float32)):
            x = images.to(dtype).requires_grad_()
            y = layer(x)
            weights = torch.cos(torch.arange(y.numel())).view(y.shape).to(dtype)
            results.append([y, *torch.autograd.grad(y, (x, layer.weight), weights)])
        for theirs, ours in zip(*results):
            assert ours.dtype == torch.float32 and ours.shape == theirs.shape
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_other_layers_stay_torchs():
    layers = [torch.nn.Conv2d(128, 128, 1, groups=2), torch.nn.Conv2d(128, 128, 3, padding=1, groups=128)]
    layers += [torch.nn.Conv2d(128, 128, 5, groups=64, bias=False), torch.nn.Conv2d(8, 8, 5, groups=8)]
    assert convolution.speed_up(torch.nn.Sequential(*layers), torch.float32) == 0


@pytest.mark.parametrize("stride, bias", [(1, False), (1, True), (2, False)])
def test_products_equal_1x1_convolutions(stride, bias):
    torch.manual_seed(0)
    stock = torch.nn.Conv2d(128, 32, 1, stride, bias=bias).to(memory_format=torch.channels_last)
    fast = copy.deepcopy(stock)
    assert convolution.speed_up(fast, torch.bfloat16) == 1 and type(fast) is convolution.PointwiseConv2d
    images = torch.randn(4, 128, 7, 7).to(memory_format=torch.channels_last)
    results = []
    for module in (stock, fast):
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        y.float().pow(2).sum().backward()
        results.append([y, x.grad] + [parameter.grad for parameter in module.parameters()])
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    for theirs, ours in zip(*results):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 2, 1, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_axis_is_mixed_without_a_copy(order, dtype, tolerance, bias):
    torch.manual_seed(0)
    memory = torch.randn(2, 5, 6, 7).permute(order)
    stock = torch.nn.Conv2d(memory.shape[1], 4, 1, bias=bias)
    fast = copy.deepcopy(stock)
    assert convolution.speed_up(fast, dtype) == 1
    results = []
    for layer, kind in ((stock.double(), torch.float64), (fast, dtype)):
        x = memory.to(torch.float64 if layer is stock else torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == torch.bfloat16):
            y = layer(x)
        weights = torch.cos(torch.arange(y.numel())).view(y.shape).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, (x, *layer.parameters()), weights)])
    assert results[1][0].dtype == dtype
    assert sorted(range(4), key=results[1][0].stride) == sorted(range(4), key=memory.stride)
    for theirs, ours in zip(*results):
        assert ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_model_keeps_its_state_and_its_function():
    with imported("MnasNet") as models:
        model = models.mnasnet0_5(10).eval()
    fast = copy.deepcopy(model)
    assert convolution.speed_up(fast, torch.bfloat16) == 17 + 34  # depthwise and 1x1
    assert list(fast.state_dict()) == list(model.state_dict())
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert torch.equal(fast(images), model(images))


def test_gradients_of_a_model_in_bfloat16_are_as_near_to_float32_as_torchs():
    torch.manual_seed(0)
    with imported("MnasNet") as models:
        model = models.mnasnet0_5(10, dropout=0.0)
    images, targets = torch.randn(16, 3, 96, 96), torch.arange(16) % 10
    gradients = []
    for mixed, fast in ((False, False), (True, False), (True, True)):
        changed = copy.deepcopy(model)
        if fast:
            convolution.speed_up(changed, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = torch.nn.functional.cross_entropy(changed(images), targets)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in changed.parameters()]))
    exact, theirs, ours = gradients
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()
