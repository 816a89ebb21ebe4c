"""ShuffleNetV2 against torchvision's, and against numbers computed with megvii's code (float64, tests/data)."""

import json
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from common.transforms import import_torchvision
from tests.helpers import ROOT, fill_, images, imported, tiers

torchvision = import_torchvision()
EXPECTED = json.loads((ROOT / "tests" / "data" / "fingerprints_megvii.json").read_text())
WIDTHS = ("0_5", "1_0", "1_5", "2_0")
PARAMETERS = {"0_5": 1366792, "1_0": 2278604, "1_5": 3503624, "2_0": 7393996}
STAGES = {"0_5": (48, 96, 192, 1024), "1_0": (116, 232, 464, 1024), "1_5": (176, 352, 704, 1024)}
STAGES["2_0"] = (244, 488, 976, 2048)
GRADIENTS = (
    "conv1.0.weight",
    "stage2.0.branch1.2.weight",
    "stage2.0.branch2.5.weight",
    "stage2.1.branch2.0.weight",
    "stage3.0.branch1.0.weight",
    "stage4.3.branch2.6.bias",
    "conv5.0.weight",
    "fc.weight",
)


def build(width, form="plain", **options):
    with imported("ShuffleNetV2") as models:
        return getattr(models.CHANNEL_SHUFFLE[form], "shufflenet_v2_x" + width)(**options)


def convert(state, model):
    with imported("ShuffleNetV2", "models.pretrained") as pretrained:
        return pretrained.convert(state, model)


def oracle(width):
    return getattr(torchvision.models, "shufflenet_v2_x" + width)(weights=None)


def close(actual, expected, tolerance=1e-8):
    actual, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def step(model, x):
    """Return the loss and the gradients, by name, of one training step."""
    loss = F.cross_entropy(model.train()(x), torch.arange(len(x)))
    names, parameters = zip(*model.named_parameters())
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters)))


def megvii_shapes(width):
    """List the names and shapes in a checkpoint of megvii's, in its order."""
    shapes = {}

    def conv_bn(name, index, out, inputs, kernel):
        shapes["{}.{}.weight".format(name, index)] = (out, inputs, kernel, kernel)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes["{}.{}.{}".format(name, index + 1, tensor)] = (out,)
        shapes["{}.{}.num_batches_tracked".format(name, index + 1)] = ()

    conv_bn("first_conv", 0, 24, 3, 3)
    channels, block = 24, 0
    for out, repeats in zip(STAGES[width], (4, 8, 4)):
        for index in range(repeats):
            inputs = channels if index == 0 else out // 2
            main, proj = ("features.{}.branch_{}".format(block, branch) for branch in ("main", "proj"))
            conv_bn(main, 0, out // 2, inputs, 1)
            conv_bn(main, 3, out // 2, 1, 3)
            conv_bn(main, 5, out - inputs, out // 2, 1)
            if index == 0:
                conv_bn(proj, 0, inputs, 1, 3)
                conv_bn(proj, 2, inputs, inputs, 1)
            channels, block = out, block + 1
    conv_bn("conv_last", 0, STAGES[width][3], channels, 1)
    shapes["classifier.0.weight"] = (1000, STAGES[width][3])
    return shapes


def megvii_state(width):
    """Return a checkpoint of megvii's with the weights that `fill_` gives its network."""
    root = torch.nn.Module()
    for name, shape in megvii_shapes(width).items():
        path, _, leaf = name.rpartition(".")
        module = root
        for part in path.split("."):
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        dtype = torch.float64 if shape else torch.int64
        module.register_buffer(leaf, torch.zeros(shape, dtype=dtype))
    return fill_(root).state_dict()


def pixels(n=2):
    return (images(n, 224) * 50 + 128).round().clamp(0, 255)


def normalised(x):
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    return (x / 255 - mean) / std


@pytest.mark.parametrize("width", WIDTHS)
def test_same_keys_as_torchvision(width):
    theirs = [(key, value.shape) for key, value in oracle(width).state_dict().items()]
    for form in ("plain", "wock"):
        model = build(width, form)
        assert [(key, value.shape) for key, value in model.state_dict().items()] == theirs
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[width]
        assert {module.eps for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1e-5}


@pytest.mark.parametrize("width", WIDTHS)
def test_same_outputs_and_gradients_as_torchvision(width):
    theirs, x = fill_(oracle(width).double()), images(2, 96)
    with torch.no_grad():
        logits = theirs.eval()(x)
    loss, gradients = step(theirs, x)
    for form in ("plain", "wock"):
        model = fill_(build(width, form).double())
        with torch.no_grad():
            close(model.eval()(x), logits)
        ours = step(model, x)
        close(ours[0], loss)
        for name, gradient in gradients.items():
            close(ours[1][name], gradient)


def test_initialisation_is_torchvisions():
    torch.manual_seed(0)
    theirs = oracle("0_5").state_dict()
    for form in ("plain", "wock"):
        torch.manual_seed(0)
        for key, value in build("0_5", form).state_dict().items():
            assert torch.equal(value, theirs[key]), key


def targets(graph):
    return {str(node.target) for node in graph.nodes if node.op in ("call_function", "call_method")}


@pytest.mark.parametrize("form, megvii", tiers([("plain", False), ("wock", False), ("wock", True)], [("plain", True)]))
def test_operations_of_the_graph(form, megvii):
    model = build("0_5" if form == "plain" else "1_0", form)
    if megvii:
        model.use_megvii_form()
    evaluation = make_fx(model.eval())(torch.rand(1, 3, 64, 64)).graph
    training = make_fx(lambda x: step(model, x)[1])(torch.rand(2, 3, 64, 64)).graph
    assert {"aten.convolution.default", "aten.convolution_backward.default"} <= targets(training)
    found = targets(evaluation) | targets(training) | targets(torch.fx.symbolic_trace(model).graph)
    found = {name for name in found for move in ("chunk", "split", "transpose", "permute") if move in name}
    expected = {"aten.split.Tensor", "aten.transpose.int", "chunk", "transpose"}
    assert found == (set() if form == "wock" else expected)
    # The gradient of a slice is a tensor of zeros to copy it into; the first block of megvii's form has such.
    assert (
        form == "plain"
        or megvii
        or not any("slice_backward" in name or "slice_scatter" in name for name in targets(training))
    )


@pytest.mark.parametrize("width", ["0_5", "1_0"])
def test_channels_last_stays(width):
    """The default form shuffles in the memory of its images: no block after it has to turn them back."""
    contiguous, x = fill_(build(width, "wock").double()), images(2, 96)
    expected = step(contiguous, x)
    model, blocks, layouts = fill_(build(width, "wock").double()).to(memory_format=torch.channels_last), [], []

    def note(gradient):
        layouts.append(gradient.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if hasattr(module, "shuffle"):
            module.register_forward_hook(lambda module, inputs, output: blocks.append(output))
            module.branch2.register_forward_hook(lambda module, inputs, output: output.register_hook(note) and None)
    loss, gradients = step(model, x.to(memory_format=torch.channels_last))
    assert [block.is_contiguous(memory_format=torch.channels_last) for block in blocks] == layouts == [True] * 16
    close(loss, expected[0])
    for name, gradient in expected[1].items():
        close(gradients[name], gradient)


@pytest.mark.parametrize("width", WIDTHS)
def test_megvii_checkpoint(width):
    expected, state, x = EXPECTED[width], megvii_state(width), normalised(pixels())
    lines = ["{} {}".format(key, tuple(shape)) for key, shape in megvii_shapes(width).items()]
    assert [len(lines), zlib.crc32("\n".join(lines).encode())] == expected["keys"]
    for form in ("plain", "wock"):
        model = build(width, form).double()
        converted, notes = convert(state, model)
        model.load_state_dict(converted)
        assert len(notes) == 3 and "no bias" in notes[0]
        with torch.no_grad():
            close(model.eval()(x)[:, ::125].flatten(), expected["logits"])
        gradients = step(model, x)[1]
        close([gradients[name].norm() for name in GRADIENTS], expected["gradients"])


@pytest.mark.parametrize("width", ["0_5", "1_0"])
def test_megvii_form_is_saved_and_loaded(width):
    first = build(width, "wock")
    state, _ = convert({key: value.float() for key, value in megvii_state(width).items()}, first)
    first.load_state_dict(state)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.01)
    x = normalised(pixels()).float()
    F.cross_entropy(first.train()(x), torch.tensor([0, 1])).backward()
    before = first.stage2[0].branch1[2].weight.clone()
    optimizer.step()
    assert not torch.equal(before, first.stage2[0].branch1[2].weight) and first.fc.bias.abs().sum() > 0
    second = build(width)
    with pytest.raises(RuntimeError, match="megvii_form"):
        second.load_state_dict(first.state_dict())
    state, notes = convert(first.state_dict(), second)
    second.load_state_dict(state)
    assert len(notes) == 1 and "megvii's form" in notes[0]
    with torch.no_grad():
        torch.testing.assert_close(second.eval()(x), first.eval()(x))


def test_megvii_checkpoint_with_other_classes():
    state = dict(megvii_state("0_5"), **{"classifier.0.weight": torch.ones(7, 1024, dtype=torch.float64)})
    converted, _ = convert(state, build("0_5"))
    assert torch.equal(converted["fc.weight"], torch.ones(7, 1024)) and converted["fc.bias"].shape == (7,)


@pytest.mark.parametrize("width, other", [("1_0", "0_5"), ("1_0", "1_5")])
def test_megvii_checkpoint_of_another_width(width, other):
    model = build(width)
    with pytest.raises(RuntimeError, match=r"size mismatch for stage2\.0"):
        convert(megvii_state(other), model)
    assert not model.megvii


def test_exported_names():
    with imported("ShuffleNetV2") as models:
        assert models.__all__ == ["shufflenet_v2_x" + width for width in WIDTHS]
        assert all(form.__all__ == models.__all__ for form in models.CHANNEL_SHUFFLE.values())
        assert getattr(models, models.__all__[0])().classifier_keys == ("fc",)
