"""`--export` and `--predict`: the files are right, or there is one clear line and no file."""

import csv
import json
import pickle
import sys
import types

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from common import export
from common.errors import UserError
from tests.helpers import BUNDLES, fill_, images, imported, main_py

NETWORKS = {  # of the default tier
    "MnasNet": [("mnasnet0_5", {})],
    "PnasNet5Large": [("pnasnet5large", {"zero_pad": True})],  # the one with paddings of its own
    "SPACH-SMLP": [("spach_ms_xxs_patch4_224_attn", {})],
    "SPNASNet_100": [("spnasnet_100", {})],
    "ShuffleNetV2": [("shufflenet_v2_x0_5", {"channel_shuffle": "wock"})],
}
SIZE = 64


def _all_constructors(bundle):
    with imported(bundle) as models:
        forms = {"PnasNet5Large": [{"zero_pad": True}, {"zero_pad": False}]}
        forms["ShuffleNetV2"] = [{"channel_shuffle": form} for form in getattr(models, "CHANNEL_SHUFFLE", ())]
        return [(arch, options) for arch in models.__all__ for options in forms.get(bundle, [{}])]


CASES = [
    pytest.param(
        *(bundle, arch, options),
        id="-".join([arch, *map(str, options.values())]),
        marks=[] if (arch, options) in NETWORKS[bundle] else [pytest.mark.slow],
    )
    for bundle in BUNDLES
    for arch, options in _all_constructors(bundle)
]


def checkpoint(path, bundle, arch, options=None, classes=10, **parts):
    """Write what a run of the bundle would have saved; return the network, in evaluation mode."""
    options = dict(options or {}, image_size=SIZE)
    with imported(bundle) as models:
        own = {"zero_pad": options["zero_pad"]} if "zero_pad" in options else {}
        own.update({"image_size": SIZE} if bundle == "SPACH-SMLP" else {})
        source = models.CHANNEL_SHUFFLE[options["channel_shuffle"]] if "channel_shuffle" in options else models
        model = getattr(source, arch)(classes, **own)
    fill_(model.double()).float()
    names = ["class {}".format(number) for number in range(classes)]
    content = {"arch": arch, "classes": names, "args": options, "state_dict": model.state_dict()}
    torch.save(dict(content, **parts), str(path))
    return model.eval()


def main(bundle, *options):
    """Run main.py of `bundle` as a user does."""
    return main_py(bundle, "--workers=1", *options)


def refusal(*options):
    """Return the line with which MnasNet's main.py refuses the options."""
    with imported("MnasNet", "main") as module, pytest.raises(UserError) as refused:
        module.main(["--device=cpu", *map(str, options)])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def _assert_static(graph):
    constants = {node.output[0] for node in graph.node if node.op_type == "Constant"}
    constants.update(tensor.name for tensor in graph.initializer)
    for node in graph.node:
        assert node.op_type != "Pad" or set(node.input[1:]) - {""} <= constants, node.name
        assert "auto_pad" not in [attribute.name for attribute in node.attribute]


@pytest.mark.parametrize("bundle, arch, options", CASES)
def test_onnxruntime_computes_what_the_model_does(bundle, arch, options, tmp_path):
    model = checkpoint(tmp_path / "weights.pth.tar", bundle, arch, options)
    process = main(bundle, "--resume", tmp_path / "weights.pth.tar", "--export", tmp_path / "model.onnx")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "wrote {}".format(tmp_path / "model.onnx") in process.stdout
    assert process.stderr == ""
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = images(batch, SIZE).float()
        with torch.no_grad():
            expected = model(x).numpy()
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        assert logits.shape == (batch, 10)
        assert np.abs(expected).max() > 0.1
        assert np.abs(logits - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    written = onnx.load(str(tmp_path / "model.onnx"))
    assert (written.opset_import[0].version, written.ir_version) == (10, 6)
    _assert_static(written.graph)
    facts = {entry.key: entry.value for entry in written.metadata_props}
    assert facts["arch"] == arch and json.loads(facts["classes"])[9] == "class 9"
    assert json.loads(facts["image_size"]) == SIZE and json.loads(facts["resize"]) == SIZE * 8 // 7
    assert json.loads(facts["mean"]) == ([0.5] * 3 if bundle == "PnasNet5Large" else [0.485, 0.456, 0.406])


def test_half_precision(tmp_path):
    model = checkpoint(tmp_path / "weights.pth.tar", "MnasNet", "mnasnet0_5")
    process = main("MnasNet", "--resume", tmp_path / "weights.pth.tar", "--export", tmp_path / "model.onnx", "--half")
    assert process.returncode == 0, process.stderr
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x = images(2, SIZE).float()
    (logits,) = session.run(["logits"], {"images": x.numpy().astype(np.float16)})
    expected = model(x).detach().numpy()
    assert logits.dtype == np.float16 and 1e-5 < np.abs(logits - expected).max() / np.abs(expected).max() < 1e-2
    assert (tmp_path / "model.onnx").stat().st_size < 0.52 * sum(4 * p.numel() for p in model.parameters())


def test_the_averaged_weights_as_safetensors(tmp_path):
    """A run that measured the averaged weights exports them; `--pretrained` takes the file."""
    weights, arch = tmp_path / "weights.pth.tar", "spach_ms_xxs_patch4_224_conv"
    model = checkpoint(weights, "SPACH-SMLP", arch)
    average = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    checkpoint(weights, "SPACH-SMLP", arch, {"eval_ema": True}, state_dict_ema=average)
    process = main("SPACH-SMLP", "--resume", weights, "--export", tmp_path / "model.safetensors")
    assert process.returncode == 0, process.stderr
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert set(file.keys()) == set(average)
        assert all(torch.equal(file.get_tensor(key), average[key]) for key in average)
        assert file.metadata()["arch"] == arch
    options = ["--arch", arch, "--image-size", SIZE, "--num-classes", 10]
    process = main(
        "SPACH-SMLP", "--pretrained", tmp_path / "model.safetensors", "--export", tmp_path / "model.onnx", *options
    )
    assert process.returncode == 0, process.stderr


class Moody(torch.nn.Module):
    """Answers otherwise the third time it is called, which is when it is traced."""

    def __init__(self, by):
        super().__init__()
        self.head, self.calls, self.by = torch.nn.Linear(3, 10), 0, by

    def forward(self, x):
        self.calls += 1
        return self.head(x.mean((2, 3))) + (self.by if self.calls > 2 else 0)


def export_model(model, **options):
    """Run `export.run` on `model`, whose images have 8 pixels a side, without a command line."""
    args = dict({"arch": "none", "export": None, "predict": None, "half": False, "notices": []}, **options)
    crop = types.SimpleNamespace(size=8, resize=9, interpolation="bilinear")
    card, log = types.SimpleNamespace(notices=[]), types.SimpleNamespace(line=print)
    export.run(types.SimpleNamespace(**args), model, ["a"] * 10, crop, (0.5,) * 3, (0.5,) * 3, card, log)


@pytest.mark.parametrize("half, value", [(True, 7e4), (False, float("nan"))])
def test_weights_that_are_no_numbers_in_the_file_are_refused(half, value, tmp_path):
    model = Moody(0)
    with torch.no_grad():
        model.head.bias[3] = value
    with pytest.raises(UserError, match="no file: weights are not finite numbers, or too large for the float16"):
        export_model(model, export=str(tmp_path / "model.safetensors"), half=half)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("by, text", [(1e-3, "0.001"), (float("nan"), "nan")])
def test_a_file_that_computes_otherwise_is_not_written(by, text, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("the one before")
    with pytest.raises(UserError, match="onnxruntime's logits differ from the model's by {} of".format(text)):
        export_model(Moody(by), export=str(path))
    assert path.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["no/m.onnx", "no/m.safetensors", "folder/m.onnx", "m.onnx"])
def test_a_file_that_cannot_be_written_is_one_line(name, tmp_path):
    (tmp_path / "folder").write_text("no folder")
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(UserError, match=r"cannot be written: (No such file|Not a directory|Is a directory)"):
        export_model(Moody(0), export=str(tmp_path / name))


@pytest.mark.parametrize("package, name", [("onnxruntime", "m.onnx"), ("safetensors.numpy", "m.safetensors")])
def test_a_missing_package_is_one_line(package, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    checkpoint(tmp_path / "weights.pth.tar", "MnasNet", "mnasnet0_5")
    line = refusal("--resume", tmp_path / "weights.pth.tar", "--export", tmp_path / name)
    assert "{} is missing: pip install ".format(package.split(".")[0]) in line and not (tmp_path / name).exists()
    assert package != "onnxruntime" or line.endswith("pip install onnx onnxruntime")


def _reference(model, path):
    """Return (class, probability) of the likeliest classes, by PIL and a plain softmax."""
    image = Image.open(str(path)).convert("RGB")
    shorter = min(image.size)
    image = image.resize([SIZE * 8 // 7 * side // shorter for side in image.size], Image.BILINEAR)
    left, top = ((side - SIZE) // 2 for side in image.size)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIZE, top + SIZE)))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    probabilities = model(((pixels - mean) / std).unsqueeze(0)).softmax(1)[0]
    best = probabilities.argsort(descending=True)[:5].tolist()
    return [("class {}".format(number), probabilities[number].item()) for number in best]


@pytest.fixture
def photos(few_digits, tmp_path):
    """A folder of two images, one of them below, a text and a damaged image."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for target, source in (("three.jpg", "val/3"), ("sub/four.jpg", "val/4")):
        Image.open(str(sorted((few_digits / source).iterdir())[0])).resize((100, 80)).save(str(folder / target))
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.jpg").write_text("no image")
    return folder


@pytest.mark.parametrize("option", ["--resume", "--pretrained"])
def test_a_folder(option, photos, tmp_path):
    model = checkpoint(tmp_path / "weights.pth.tar", "MnasNet", "mnasnet0_5")
    out = tmp_path / "a new" / "folder"
    process = main("MnasNet", option, tmp_path / "weights.pth.tar", "--predict", photos, "--output-dir", out)
    assert process.returncode == 0, process.stderr
    assert "[Warning] {} cannot be read".format(photos / "broken.jpg") in process.stdout
    assert "2 of 3 images are in {}".format(out / "predictions.csv") in process.stdout
    with open(str(out / "predictions.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["broken.jpg", "three.jpg", "sub/four.jpg"]
    assert rows[0]["class1"] == rows[0]["probability1"] == ""
    for row in rows[1:]:
        expected = _reference(model, photos / row["image"])
        assert [row["class{}".format(i)] for i in range(1, 6)] == [name for name, _ in expected]
        found = [float(row["probability{}".format(i)]) for i in range(1, 6)]
        assert found == pytest.approx([probability for _, probability in expected], abs=5e-3)


def test_one_image_is_answered_on_the_screen(photos, tmp_path):
    model = checkpoint(tmp_path / "weights.pth.tar", "MnasNet", "mnasnet0_5")
    process = main("MnasNet", "--resume", tmp_path / "weights.pth.tar", "--predict", photos / "three.jpg")
    lines = process.stdout.splitlines()[-5:]
    for line, (name, probability) in zip(lines, _reference(model, photos / "three.jpg")):
        percent, _, found = line.strip().partition(" %  ")
        assert found == name and float(percent) == pytest.approx(100 * probability, abs=0.5)
    assert not (tmp_path / "predictions.csv").exists()
    process = main("MnasNet", "--resume", tmp_path / "weights.pth.tar", "--predict", photos / "broken.jpg")
    assert process.returncode == 1 and "[Error] {}".format(photos / "broken.jpg") in process.stderr


class Attack:
    def __reduce__(self):
        return (open, ("attacked", "w"))


def test_what_is_refused(few_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint("ok.pth", "MnasNet", "mnasnet0_5")
    checkpoint("other.pth", "ShuffleNetV2", "shufflenet_v2_x0_5")
    torch.save({"state_dict": Attack()}, "attack.pth", pickle_module=pickle)
    (image,) = list((few_digits / "val" / "3").iterdir())[:1]
    predict = ["--predict", image]
    assert refusal(*predict, "--resume", "attack.pth").startswith("attack.pth holds more than tensors")
    assert not (tmp_path / "attacked").exists()
    assert "other.pth is of another network" in refusal(*predict, "--resume", "other.pth")
    assert refusal(*predict).endswith("need --resume FILE or --pretrained FILE")
    assert "--resume FILE" in refusal("--export", "m.onnx", "--resume", "auto")
    assert refusal(*predict, "--resume", "none.pth") == "--resume: there is no file none.pth"
    assert "there is no" in refusal("--predict", "none", "--resume", "ok.pth")
    with pytest.raises(SystemExit):
        refusal("--export", "m.pb", "--resume", "ok.pth")
    assert "argument --export: 'm.pb' is not FILE.onnx or FILE.safetensors" in capsys.readouterr().err
    assert refusal("--export", "no/m.safetensors", "--resume", "ok.pth").endswith("No such file or directory")
    assert refusal(*predict, "--half", "--resume", "ok.pth") == "--half goes with --export"
    assert "one of them" in refusal(*predict, "--evaluate", "--resume", "ok.pth")
    assert "one card" in refusal(*predict, "--device-list", "0,1", "--resume", "ok.pth")
    torch.save(torch.load("ok.pth")["state_dict"], "plain.pth")
    text = refusal("--export", "m.onnx", "--pretrained", "plain.pth", "--arch", "mnasnet0_5")
    assert text == "plain.pth has 10 classes, the data set has 1000 (where there is none: --num-classes 10)"
