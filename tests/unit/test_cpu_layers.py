"""The faster layers and their gradients are torch's own; what replaces a layer takes over all that it holds."""

import copy

import pytest
import torch

from common import cpu_layers
from tests.helpers import BUNDLES, imported


@pytest.mark.parametrize(
    "kernel, stride, side, padding",
    [(k, s, side, k // 2) for k in (3, 5, 7) for s in (1, 2) for side in (1, 2, 3, 4, 7, 14, 21)]
    + [(5, 2, 16, 1), (7, 2, 21, 2), (3, 2, 8, 0), (5, 1, 9, 4), (7, 2, 9, 6), (5, 1, 9, 0)],
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
            y = cpu_layers.DepthwiseFunction.apply(x, w, stride, padding)
        else:
            y = torch.nn.functional.conv2d(x, w, None, stride, padding, groups=24)
        gradients += torch.autograd.grad(y, (x, w), torch.cos(torch.arange(y.numel())).view(y.shape).to(kind))
    for ours, reference in zip(found, expected):
        assert ours.dtype == dtype and ours.shape == reference.shape
        assert (ours.double() - reference).norm() <= tolerance * reference.norm()


def test_depthwise_gradients_of_oblong_images_equal_torchs():
    torch.manual_seed(0)
    for kernel, stride, (height, width) in ((5, 2, (9, 16)), (5, 1, (16, 9)), (7, 2, (5, 12)), (3, 2, (2, 9))):
        x, w = torch.randn(2, 8, height, width, dtype=torch.float64), torch.randn(8, 1, kernel, kernel).double()
        results = []
        for function in (cpu_layers.DepthwiseFunction.apply, lambda *a: torch.nn.functional.conv2d(*a, groups=8)):
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            arguments = (stride, kernel // 2) if not results else (None, stride, kernel // 2)
            results.append(torch.autograd.grad(function(x, w, *arguments).sin().sum(), (x, w)))
        for ours, theirs in zip(*results):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_layers_without_a_faster_form_stay_as_they_are():
    conv = torch.nn.Conv2d
    layers = torch.nn.Sequential(
        conv(128, 128, 1, groups=2),
        conv(128, 128, 3, padding=1, groups=128),  # has a bias
        conv(128, 128, 5, groups=64, bias=False),
        conv(8, 8, 3, padding=4, groups=8, bias=False),
        conv(8, 8, 3, padding=1, groups=8, bias=False, padding_mode="reflect"),
        conv(8, 8, 3, padding="same", groups=8, bias=False),
        conv(8, 16, 3, padding=1, groups=8, bias=False),
        torch.nn.ConvTranspose2d(8, 8, 1),
        torch.nn.BatchNorm2d(64),
        torch.nn.BatchNorm2d(8, affine=False),
        torch.nn.BatchNorm2d(8, track_running_stats=False),
        torch.nn.BatchNorm2d(8, momentum=None),
    )
    before = list(layers)
    assert all(ours is theirs for ours, theirs in zip(cpu_layers.convert_layers(layers), before))


@pytest.mark.parametrize("stride, bias", [(1, False), (1, True), (2, False)])
def test_products_equal_1x1_convolutions(stride, bias):
    torch.manual_seed(0)
    stock = torch.nn.Conv2d(128, 32, 1, stride, bias=bias).to(memory_format=torch.channels_last)
    fast = cpu_layers.convert_layers(copy.deepcopy(stock))
    assert type(fast) is cpu_layers.PointwiseConv2d
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
    fast = cpu_layers.convert_layers(copy.deepcopy(stock))
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


@pytest.mark.parametrize("shape", [(4, 24, 64, 64), (16, 58, 33, 32)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_batch_norm_of_pixels_that_count_as_one_equals_torchs(shape, dtype, tolerance):
    torch.manual_seed(0)
    stock = torch.nn.BatchNorm2d(shape[1], momentum=0.3)
    with torch.no_grad():
        stock.weight.uniform_(0.5, 2.0)
        stock.bias.normal_()
    fast = cpu_layers.convert_layers(copy.deepcopy(stock))
    images = (2 * torch.randn(shape) + torch.randn(shape[1], 1, 1)).to(dtype).to(memory_format=torch.channels_last)
    images[:2] += 1  # pixels of one image are more alike
    weights = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    results = []
    for layer, kind in ((stock.double(), torch.float64), (fast, dtype)):
        x = images.to(kind, memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.nn.functional.relu(layer(x), inplace=True)
        assert ("BatchNormFunction" in str(y.grad_fn.next_functions)) == (layer is fast)
        assert y.is_contiguous(memory_format=torch.channels_last)
        gradients = torch.autograd.grad(y, (x, *layer.parameters()), weights.to(kind))
        results.append([y, *gradients, layer.running_mean, layer.running_var])
    assert results[1][0].dtype == results[1][1].dtype == dtype
    for theirs, ours in zip(*results):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert fast.num_batches_tracked == stock.num_batches_tracked == 1


@pytest.mark.parametrize("change", ["eval", "float32", "contiguous", "few pixels", "an odd number of pixels"])
def test_batch_norm_elsewhere_is_torchs_digit_for_digit(change):
    torch.manual_seed(0)
    side = {"few pixels": 32, "an odd number of pixels": 91}.get(change, 64)
    stock, images = torch.nn.BatchNorm2d(24), torch.randn(4 if side != 91 else 3, 24, side, side)
    fast = cpu_layers.convert_layers(copy.deepcopy(stock))
    assert type(fast) is cpu_layers.BatchNorm2d
    if change != "contiguous":
        images = images.to(memory_format=torch.channels_last)
    results = []
    for layer in (stock.train(change != "eval"), fast.train(change != "eval")):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change != "float32"):
            results.append(layer(images))
    assert torch.equal(*results)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fast.buffers(), stock.buffers()))


def test_a_replaced_layer_keeps_names_parameters_hooks_and_mode():
    with imported("MnasNet") as models:
        model = models.mnasnet0_5(10)
    model.layers[0].eval()
    before, layer = copy.deepcopy(model), model.layers[3]  # the first depthwise convolution
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append("hook"))
    parameters, modules, state = list(model.parameters()), list(model.named_modules()), model.state_dict()
    random = torch.get_rng_state()
    assert cpu_layers.convert_layers(model) is model
    assert torch.equal(torch.get_rng_state(), random)  # nothing was drawn for new weights
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(cpu_layers.DepthwiseConv2d) == 17 and kinds.count(cpu_layers.PointwiseConv2d) == 34
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters))  # which the optimizer holds
    assert [name for name, _ in model.named_modules()] == [name for name, _ in modules]
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert list(model.state_dict()) == list(state) and model.state_dict()._metadata == state._metadata
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert torch.equal(model.eval()(images), before.eval()(images)) and calls == ["hook"]
    handle.remove()  # the handle taken before still works
    model(images)
    assert calls == ["hook"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_converted_network_loads_and_computes_what_it_did(bundle):
    with imported(bundle, "main") as main:
        parser = main.build_parser()
        model = getattr(main.models, parser.get_default("arch"))(10).eval()
    fast = cpu_layers.convert_layers(copy.deepcopy(model))
    assert type(model) is type(fast) and "Conv2d" in {type(module).__name__ for module in model.modules()}
    assert not any(type(module).__module__ == "common.cpu_layers" for module in model.modules())
    fast.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.allclose(fast(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bundle, arch", [("MnasNet", "mnasnet0_5"), ("SPACH-SMLP", "smlpnet_tiny")])
def test_gradients_have_the_strides_of_their_weights(bundle, arch):
    """Else DistributedDataParallel warns on the user's screen."""
    with imported(bundle) as models:
        model = getattr(models, arch)(10, **({} if bundle == "MnasNet" else {"image_size": 64}))
    model = model.to(memory_format=torch.channels_last)
    cpu_layers.convert_layers(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)).float().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad.stride() != weight.stride()] == []


def test_gradients_of_a_model_in_bfloat16_are_as_near_to_float32_as_torchs():
    torch.manual_seed(0)
    with imported("MnasNet") as models:
        model = models.mnasnet0_5(10, dropout=0.0)
    images, targets = torch.randn(16, 3, 96, 96), torch.arange(16) % 10
    gradients = []
    for mixed, fast in ((False, False), (True, False), (True, True)):
        changed = copy.deepcopy(model)
        if fast:
            cpu_layers.convert_layers(changed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = torch.nn.functional.cross_entropy(changed(images), targets)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in changed.parameters()]))
    exact, theirs, ours = gradients
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()
