"""PNASNet-5-Large against timm's, and against numbers from Cadene's and Ascend's code (float64)."""

import json
import sys
import zlib

import pytest
import torch
import torch.nn.functional as F

from common.transforms import import_torchvision
from tests.helpers import ROOT, fill_, images, imported, run, tiers

import_torchvision()
import timm  # noqa: E402  it imports torchvision itself

EXPECTED = json.loads((ROOT / "tests" / "data" / "fingerprints_pnasnet.json").read_text())
GRADIENTS = (
    "conv_0.conv.weight",
    "cell_stem_0.comb_iter_0_left.separable_1.depthwise_conv2d.weight",
    "cell_stem_1.conv_prev_1x1.path_2.conv.weight",
    "cell_4.comb_iter_2_right.separable_1.depthwise_conv2d.weight",
    "cell_4.comb_iter_4_right.conv.weight",
    "cell_5.conv_prev_1x1.path_2.conv.weight",
    "cell_11.comb_iter_3_left.bn_sep_2.weight",
    "last_linear.weight",
)
LATE = (
    "cell_8.comb_iter_4_right.conv.weight",
    "cell_10.conv_1x1.conv.weight",
    "aux.features.2.weight",
    "aux.features.6.bias",
    "aux.classifier.weight",
)


def build(**options):
    with imported("PnasNet5Large") as models:
        return models.pnasnet5large(**options)


def convert(state, model):
    with imported("PnasNet5Large", "models.pretrained") as pretrained:
        return pretrained.convert(state, model)


def signature(model):
    lines = ["{} {}".format(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    return [len(lines), zlib.crc32("\n".join(lines).encode()), sum(p.numel() for p in model.parameters())]


def eval_logits(model, size):
    with torch.no_grad():
        return model.eval()(images(1, size))[0]


def gradient_norms(model, names, size, loss):
    """Return the norms of the gradients of the parameters `names` after one training step on two images."""
    chosen = [dict(model.named_parameters())[name] for name in names]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is other for other in chosen))
    return [gradient.norm().item() for gradient in torch.autograd.grad(loss(model.train()(images(2, size))), chosen)]


def loss_of(logits):
    return F.cross_entropy(logits, torch.tensor([3, 7]))


def loss_with_aux(outputs):
    return loss_of(outputs[0]) + 0.4 * loss_of(outputs[1])


def prepare(model):
    """Fill the weights; no dropout, and running statistics that training leaves as they are."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    return fill_(model.double())


def close(actual, expected, tolerance=1e-8):
    actual, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=[True, False], ids=["original", "ascend"])
def filled(request):
    return prepare(build(use_aux=True, zero_pad=request.param, dropout=0.0))


@pytest.mark.parametrize("options", [{}, {"use_aux": True}, {"num_classes": 1001}], ids=["plain", "aux", "1001"])
def test_keys_shapes_and_order(options):
    name = "aux" if "use_aux" in options else str(options.get("num_classes", "plain"))
    for zero_pad in (False, True):
        assert signature(build(zero_pad=zero_pad, **options)) == EXPECTED["keys"][name]


def test_eval_logits(filled):
    close(eval_logits(filled, 107)[::125], EXPECTED["logits"][str(filled.zero_pad)])


def test_gradients(filled):
    filled.use_aux = False
    norms = gradient_norms(filled, GRADIENTS, 75, loss_of)
    filled.use_aux = True
    close(norms, EXPECTED["gradients"][str(filled.zero_pad)])


def test_auxiliary_head(filled):
    outputs = []
    norms = gradient_norms(filled, LATE, 331, lambda pair: outputs.extend(pair) or loss_with_aux(pair))
    expected = EXPECTED["aux"][str(filled.zero_pad)]
    close(outputs[0][0, ::125], expected["logits"])
    close(outputs[1][0, ::125], expected["aux_logits"])
    close(norms, expected["gradients"])


@pytest.mark.parametrize("filled", [True], ids=["original"], indirect=True)
@pytest.mark.parametrize("size", tiers([107], [331]))
def test_timm_is_the_original(size, filled):
    model = timm.create_model("pnasnet5large", num_classes=1000).double()
    state, notes = convert(model.state_dict(), build(zero_pad=True))
    assert notes == [] and state.keys() == model.state_dict().keys()
    prepare(model)
    with torch.no_grad():
        model.eval()
        close(eval_logits(filled, size), model(images(1, size))[0])


def test_1001_classes():
    model = prepare(build(num_classes=1001, zero_pad=True))
    logits = eval_logits(model, 107)
    assert logits.shape == (1001,)
    close(logits[::125], EXPECTED["logits"]["1001"])


def test_small_images_and_the_auxiliary_head():
    model = build(num_classes=5, use_aux=True)
    with pytest.raises(ValueError, match="331 pixels"):
        model.train()(torch.zeros(2, 3, 75, 75))
    assert model.eval()(torch.zeros(1, 3, 75, 75)).shape == (1, 5)


def test_batch_norm_eps():
    for name, module in build(use_aux=True).named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.eps == (1e-5 if name.startswith("aux") else 1e-3)


def test_drop_path_rates():
    rates = {}
    for name, module in build(drop_path_rate=0.42).named_modules():
        if hasattr(module, "drop_path_rate"):
            rates.setdefault(name.split(".")[0], {})[name.split(".")[1]] = module.drop_path_rate
    assert rates.pop("cell_stem_0") == {
        "comb_iter_{}".format(branch): pytest.approx(0.0 if branch in ("0_left", "4_left") else 0.03)
        for branch in ("0_left", "1_left", "2_left", "2_right", "3_left", "4_left")
    }
    for depth, name in enumerate(["cell_stem_1"] + ["cell_{}".format(index) for index in range(12)]):
        assert list(rates[name].values()) == [pytest.approx(0.03 * (depth + 2))] * 6
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="drop_path_rate"):
            build(drop_path_rate=wrong)


def test_drop_path_drops_whole_images():
    with imported("PnasNet5Large", "models.pnasnet") as pnasnet:
        branch = pnasnet.BranchSeparables(4, 4, 3, drop_path_rate=0.3)
    x = torch.rand(4000, 4, 3, 3)
    torch.manual_seed(0)
    dropped = branch.train()(x)
    branch.drop_path_rate = 0.0
    full = branch(x)
    kept = dropped.flatten(1).abs().sum(1) > 0
    torch.testing.assert_close(dropped[kept], full[kept] / 0.7)
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.03)
    branch.drop_path_rate = 0.3
    assert torch.equal(branch.eval()(x[:5]), branch(x[:5]))


def test_convert_official_file():
    official = build(num_classes=1001).state_dict()
    state, notes = convert(official, build())
    assert state == official
    assert len(notes) == 1 and "zero_pad=True" in notes[0]
    assert convert(official, build(zero_pad=True))[1] == []


def test_convert_auxiliary_head():
    with_aux, without = build(use_aux=True), build()
    state, notes = convert(with_aux.state_dict(), without)
    assert set(state) == set(without.state_dict()) and "dropped the auxiliary head" in notes[0]
    state, notes = convert(without.state_dict(), with_aux)
    assert set(state) == set(with_aux.state_dict()) and "no auxiliary head" in notes[0]
    assert torch.equal(state["aux.classifier.weight"], with_aux.aux.classifier.weight)
    state, notes = convert(with_aux.state_dict(), with_aux)
    assert set(state) == set(with_aux.state_dict()) and notes == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image-size=322"], "the auxiliary head cannot see --image-size 322: give 323 or more, or --aux-weight 0"),
        (["--image-size=346", "--zero-pad"], "which --image-size 346 does not give: try 347"),
    ],
)
def test_image_sizes_that_do_not_fit(flags, words):
    process = run([sys.executable, ROOT / "PnasNet5Large" / "main.py", "--synthetic", "--num-classes=3", *flags])
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert words in process.stderr
