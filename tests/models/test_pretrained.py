"""`--pretrained` takes every official checkpoint format, says what it did, and refuses another network's file."""

import copy
import types

import pytest
import torch

from common import checkpoint, weights
from common.errors import UserError
from common.transforms import import_torchvision
from tests.helpers import BUNDLES, fill_, images, imported

import_torchvision()
import timm  # noqa: E402
import torchvision  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

ARCH = {
    "MnasNet": "mnasnet0_5",
    "SPNASNet_100": "spnasnet_100",
    "SPACH-SMLP": "smlpnet_tiny",
    "PnasNet5Large": "pnasnet5large",
    "ShuffleNetV2": "shufflenet_v2_x0_5",
}


def load(bundle, path, num_classes=1000, may_replace_head=True, arch=None, **options):
    """Build a bundle's model, load the file `path` into it as main.py does; return (model in eval mode, lines)."""
    with imported(bundle) as models:
        model = getattr(models, arch or ARCH[bundle])(num_classes, **options)
        convert = __import__("models.pretrained", fromlist=["convert"]).convert
        content = checkpoint.read(str(path))
        lines = weights.load(model, content, str(path), convert, may_replace_head)
    return model.eval(), lines


def without_counters(model):
    """Return the state dict as torch wrote it before 0.4.1."""
    return {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}


def logits(model, size=64):
    """Return the float64 logits of the deterministic images."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(images(2, size).double())


def assert_same_function(model, reference):
    assert torch.allclose(logits(model), logits(reference.eval()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("width", ["0_5", "0_75", "1_0", "1_3"])
def test_torchvisions_mnasnet(width, tmp_path):
    reference = getattr(torchvision.models, "mnasnet" + width)()
    fill_(reference)
    torch.save(reference.state_dict(), str(tmp_path / "weights.pth"))
    model, lines = load("MnasNet", tmp_path / "weights.pth", may_replace_head=False, arch="mnasnet" + width)
    assert_same_function(model, reference)
    assert lines == ["loaded {0} of {0} tensors from {1}".format(len(model.state_dict()), tmp_path / "weights.pth")]


def test_torchvisions_first_mnasnet(tmp_path):
    """Version 1 has a stem of 32 and 16 channels at every width; the version stands in metadata that may be lost."""
    state = torchvision.models.mnasnet0_5().state_dict()
    full_width = torchvision.models.mnasnet1_0().state_dict()
    stem = ["layers.{}.".format(i) for i in range(8)]
    state.update((key, value) for key, value in full_width.items() if key.startswith(tuple(stem)))
    first = "layers.8.0.layers."
    for key, wide in full_width.items():  # the first block reads 16 channels and writes those of the narrow network
        if key.startswith(first):
            shape = list(wide.shape)
            if key.startswith((first + "6", first + "7")) and shape:
                shape[0] = 16
            state[key] = wide.new_zeros(shape)
    reference = torchvision.models.mnasnet0_5()
    state._metadata = {"": {"version": 1}}
    reference.load_state_dict(state)
    fill_(reference)
    plain = {"module." + key: value for key, value in reference.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": plain}, str(tmp_path / "old.pth.tar"))
    model, lines = load("MnasNet", tmp_path / "old.pth.tar", may_replace_head=False)
    assert_same_function(model, reference)
    assert "version 1 of the network" in lines[1]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_timms_spnasnet(ending, tmp_path):
    reference = timm.create_model("spnasnet_100")
    fill_(reference)
    path = tmp_path / ("weights." + ending)
    if ending == "pth":
        torch.save(reference.state_dict(), str(path))
    else:
        save_file({key: value.contiguous() for key, value in reference.state_dict().items()}, str(path))
    assert_same_function(load("SPNASNet_100", path, may_replace_head=False)[0], reference)


def test_spachs_wrapper(tmp_path):
    with imported("SPACH-SMLP") as models:
        reference = models.smlpnet_tiny(image_size=64)
    fill_(reference)
    torch.save({"model": reference.state_dict()}, str(tmp_path / "weights.pth"))
    assert_same_function(load("SPACH-SMLP", tmp_path / "weights.pth", image_size=64)[0], reference)


def test_cadenes_background_class_is_dropped(tmp_path):
    with imported("PnasNet5Large") as models:
        reference = models.pnasnet5large(1001, zero_pad=True)
    torch.save(without_counters(reference), str(tmp_path / "weights.pth"))
    model, lines = load("PnasNet5Large", tmp_path / "weights.pth", may_replace_head=False, zero_pad=True)
    assert torch.equal(model.last_linear.weight, reference.last_linear.weight[1:])
    assert torch.equal(model.last_linear.bias, reference.last_linear.bias[1:])
    assert "last_linear.weight: dropped class 0 (background) of 1001" in lines


@pytest.mark.parametrize("width", ["x0_5", "x1_0", "x1_5", "x2_0"])
def test_torchvisions_shufflenet(width, tmp_path):
    reference = getattr(torchvision.models, "shufflenet_v2_" + width)()
    fill_(reference)
    torch.save(without_counters(reference), str(tmp_path / "weights.pth"))
    model, _ = load("ShuffleNetV2", tmp_path / "weights.pth", may_replace_head=False, arch="shufflenet_v2_" + width)
    assert_same_function(model, reference)


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """A file of each bundle's own network with ten classes."""
    folder = tmp_path_factory.mktemp("own")
    for bundle in BUNDLES:
        with imported(bundle) as models:
            torch.save(getattr(models, ARCH[bundle])(10).state_dict(), str(folder / (bundle + ".pth")))
    return folder


@pytest.mark.parametrize("bundle", BUNDLES)
def test_another_networks_file_is_refused(bundle, own_files):
    for other in BUNDLES:
        path = own_files / (other + ".pth")
        if other == bundle:
            _, lines = load(bundle, path, num_classes=3)
            assert any("10 classes in the file, 3 here: starts fresh" in line for line in lines)
            with pytest.raises(UserError, match="has 10 classes, the data set has 3"):
                load(bundle, path, num_classes=3, may_replace_head=False)
        else:
            with pytest.raises(UserError) as refused:
                load(bundle, path, num_classes=10)
            assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "bundle, file, network",
    [
        ("SPACH-SMLP", "smlpnet_small", "smlpnet_tiny"),
        ("SPACH-SMLP", "spach_ms_xxs_patch4_224_mlp", "spach_ms_xxs_patch4_224_conv"),
        ("ShuffleNetV2", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0"),
        ("MnasNet", "mnasnet0_75", "mnasnet1_0"),
    ],
)
def test_a_file_of_a_networks_sibling_is_refused(bundle, file, network, tmp_path):
    with imported(bundle) as models:
        torch.save(getattr(models, file)().state_dict(), str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match=r"weights\.pth is of another network: Error.* (key|mismatch)") as refused:
        load(bundle, tmp_path / "weights.pth", arch=network)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    torch.save({"epoch": 3, "loss": [1.0]}, str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="holds no state dict"):
        load("MnasNet", tmp_path / "weights.pth")


def test_which_weights_of_a_file_are_taken_is_said(tmp_path):
    with imported("MnasNet") as models:
        state = models.mnasnet0_5(10).state_dict()
        model = models.mnasnet0_5(10)
    average = {key: value + 1 for key, value in state.items()}
    content = {"state_dict": state, "state_dict_ema": average, "epoch": 3, "optimizer": {"state": {}}}
    lines = weights.load(model, content, "x", lambda state, model: (state, []), False)
    assert lines == ["loaded {0} of {0} tensors from state_dict of x (not state_dict_ema)".format(len(state))]
    assert torch.equal(model.state_dict()["layers.0.weight"], state["layers.0.weight"])
    lines = weights.load(model, content, "x", lambda state, model: (state, []), False, key="state_dict_ema")
    assert lines == ["loaded {0} of {0} tensors from state_dict_ema of x (not state_dict)".format(len(state))]
    assert torch.equal(model.state_dict()["layers.0.weight"], average["layers.0.weight"])
    del content["state_dict_ema"]
    with pytest.raises(UserError, match="x holds no state_dict_ema"):
        weights.load(model, content, "x", lambda state, model: (state, []), False, key="state_dict_ema")


@pytest.mark.parametrize("names, is_named", [(["a", "c"], True), (["a", "b"], False), (["a", "b", "c"], False)])
def test_a_head_of_other_classes_is_named(names, is_named):
    """Fine-tuning on as many classes of other names keeps the head, and says so."""
    args = types.SimpleNamespace(synthetic=False, data="d", evaluate=False, num_classes=None, notices=[])
    args.pretrained, args.classes_by_position = "x", False
    loader = types.SimpleNamespace(images=types.SimpleNamespace(classes=names))
    assert weights.class_names(args, {"classes": ["a", "b"]}, loader) == names
    assert len(args.notices) == is_named
    assert not is_named or ("a, b" in args.notices[0] and "a, c" in args.notices[0])
