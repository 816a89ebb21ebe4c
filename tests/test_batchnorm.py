"""The faster BatchNorm and ReLU on a CPU compute what torch's do."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from common import batchnorm, convolution
from tests.bundles import BUNDLES, ROOT, imported
from tests.test_scripts import small

BUILDERS = {
    "MnasNet": "mnasnet0_5",
    "PnasNet5Large": "pnasnet5large",
    "SPACH-SMLP": "smlpnet_tiny",
    "SPNASNet_100": "spnasnet_100",
    "ShuffleNetV2": "shufflenet_v2_x0_5",
}


@pytest.fixture(autouse=True)
def _small_batches_too(monkeypatch):
    monkeypatch.setitem(batchnorm._LEAST, torch.float32, 0)


def results(layers, images, dtype):
    """Return the result of training `layers`, its gradients and the running statistics, all in float64."""
    layers = copy.deepcopy(layers).to(torch.float64 if dtype == torch.float64 else torch.float32)
    images = images.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = layers(images)
    weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape).to(result.dtype)
    gradients = torch.autograd.grad(result, [images, *layers.parameters()], weights)
    return [tensor.detach().double() for tensor in [result, *gradients, *layers.buffers()]]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(8, 24, 17, 19), (1, 3, 2, 1), (5, 1, 7, 7), (33, 130, 1, 1), (2, 64, 56, 56)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_near_to_float64_as_torch(dtype, relu, shape, threads):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1], eps=1e-3, momentum=0.3)
    nn.init.uniform_(norm.weight, -1, 1)  # a ReLU behind it sees both signs
    nn.init.uniform_(norm.bias)
    stock = nn.Sequential(norm, *[nn.ReLU(inplace=True)] * relu)
    fast = copy.deepcopy(stock)
    assert batchnorm.speed_up(fast) == (1, relu)
    # In float32 errors are by chance; the last bit of a sum of up to 64, half-way to one that is 0, is 4e-6.
    mean, factor, absolute = (50, 1.1, 0) if dtype == torch.bfloat16 else (5, 4, 4e-6)
    images = (3 * torch.randn(shape) + mean).bfloat16().to(memory_format=torch.channels_last)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    exact, theirs, ours = (
        results(layers, images, kind) for layers, kind in ((stock, torch.float64), (stock, dtype), (fast, dtype))
    )
    torch.set_num_threads(usual)
    for number, reference in enumerate(exact):
        error, allowed = ((found[number] - reference).norm() for found in (ours, theirs))
        assert ours[number].shape == reference.shape
        assert error <= factor * allowed + 1e-5 * reference.norm() + absolute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so(dtype):
    images = torch.ones(2, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    images[0, 1, 0, 0] = float("nan")
    fast = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    batchnorm.speed_up(fast)
    assert fast(images).isnan()[:, 1].all()


def test_a_frozen_norm_keeps_its_relu():
    """A BatchNorm in evaluation mode, as in fine-tuning, does not do the ReLU's work."""
    fast = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    assert batchnorm.speed_up(fast) == (1, 1)
    fast[0].eval()
    assert fast(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)).min() == 0


class Shortcut(nn.Module):
    """A norm whose result has two uses, or that is called twice."""

    def __init__(self, twice):
        super().__init__()
        self.convolution, self.norm, self.relu, self.twice = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), twice

    def forward(self, images):
        normal = self.norm(self.convolution(images))
        return self.relu(normal) + (self.norm(self.convolution(images + 1)) if self.twice else normal)


@pytest.mark.parametrize("twice", [True, False])
def test_layers_with_another_use_are_kept(twice):
    stock = Shortcut(twice).to(memory_format=torch.channels_last)
    fast = copy.deepcopy(stock)
    assert batchnorm.speed_up(fast) == (1, 0)
    images = torch.randn(2, 8, 5, 5).bfloat16().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(fast(images), stock(images), rtol=0.02, atol=0.02)
    if twice:
        images = images.float()
        assert torch.equal(batchnorm.folded(stock.eval())(images), stock(images))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_network_keeps_its_state_and_its_function(bundle):
    torch.manual_seed(0)
    with imported(bundle) as models:
        options = {"image_size": 64} if bundle == "SPACH-SMLP" else {}
        stock = getattr(models, BUILDERS[bundle])(10, **options).to(memory_format=torch.channels_last)
    fast = copy.deepcopy(stock)
    norms, relus = batchnorm.speed_up(fast)
    convolution.speed_up(fast, torch.bfloat16)
    assert norms == sum(type(module) is nn.BatchNorm2d for module in stock.modules()) > 0
    assert (relus > 0) == (bundle in ("MnasNet", "SPNASNet_100", "ShuffleNetV2"))
    assert list(fast.state_dict()) == list(stock.state_dict())
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    ours, theirs = fast.eval()(images), stock.eval()(images)
    rounding = 4e-6 if bundle == "SPACH-SMLP" else 0  # its products over rows and columns add up in another order
    assert (ours - theirs).norm() <= rounding * theirs.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(images).float(), stock(images).float()
    assert (ours - theirs).norm() < 0.05 * theirs.norm()  # evaluation under autocast: ReLU where it was


def test_gradients_of_a_network_are_as_near_to_float32_as_torchs():
    torch.manual_seed(0)
    with imported("SPNASNet_100") as models:
        stock = models.spnasnet_100(10).to(memory_format=torch.channels_last)
    images, targets = torch.randn(16, 3, 96, 96).to(memory_format=torch.channels_last), torch.arange(16) % 10
    gradients = []
    for mixed, fast in ((False, False), (True, False), (True, True)):
        changed = copy.deepcopy(stock)
        if fast:
            batchnorm.speed_up(changed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = nn.functional.cross_entropy(changed(images), targets)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in changed.parameters()]))
    exact, theirs, ours = gradients
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_layers_are_torchs(compiler, tmp_path):
    """The log says so, and the training goes on."""
    flags = ["--device=cpu", "--synthetic", *small("MnasNet"), "--batch-size=4", "--max-steps=1", "--no-save"]
    for options, said in (([], False), (["--amp"], True), (["--amp", "--amp-dtype=bfloat16"], True)):
        process = subprocess.run(
            [sys.executable, str(ROOT / "MnasNet" / "main.py"), *flags, *options],
            env=dict(os.environ, CC=compiler, XDG_CACHE_HOME=str(tmp_path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )
        assert process.returncode == 0 and "Epoch: [0]" in process.stdout, process.stdout
        assert ("no C compiler (cc) with OpenMP is here" in process.stdout) == said, process.stdout
    assert not list(tmp_path.glob("**/*.so"))


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("sped_up", [False, True])
def test_an_evaluation_without_norms_gives_the_same_logits(bundle, sped_up):
    torch.manual_seed(0)
    with imported(bundle) as models:
        options = {"image_size": 64} if bundle == "SPACH-SMLP" else {}
        model = getattr(models, BUILDERS[bundle])(10, **options).to(memory_format=torch.channels_last).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.1, 0.1)
    if sped_up:
        batchnorm.speed_up(model)
        convolution.speed_up(model, torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, found = model(images), batchnorm.folded(model)(images)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in batchnorm.folded(model).modules())
    assert norms == {"SPACH-SMLP": 53, "PnasNet5Large": 4}.get(bundle, 0)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
