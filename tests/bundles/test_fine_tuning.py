"""Fine-tuning: which parameters are trained, weights of the classes in the loss, the accuracy of each class."""

import csv
import re
import shutil
import types

import numpy as np
import pytest
import torch
from torch import nn

from common import checkpoint, weights
from tests import helpers
from tests.helpers import BUNDLES, assert_refused, imported, run_script, small

NETWORKS = {
    "MnasNet": ("mnasnet0_5", "classifier.1."),
    "SPNASNet_100": ("spnasnet_100", "classifier."),
    "SPACH-SMLP": ("smlpnet_tiny", "mlp_head.0."),
    "PnasNet5Large": ("pnasnet5large", "last_linear."),
    "ShuffleNetV2": ("shufflenet_v2_x0_5", "fc."),
}


def frozen(bundle, choice):
    """Return a network after `train_only(choice)`, and the lines that it wrote."""
    lines = []
    with imported(bundle) as models:
        model = getattr(models, NETWORKS[bundle][0])(10)
    args = types.SimpleNamespace(train_only=choice, evaluate=False)
    weights.train_only(args, model, types.SimpleNamespace(line=lines.append))
    return model, lines


@pytest.mark.parametrize("bundle", BUNDLES)
def test_without_the_option_everything_is_trained(bundle):
    model, lines = frozen(bundle, None)
    weights.set_training(model.eval())
    assert lines == [] and all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_classifier_alone_is_trained_and_statistics_stay(bundle):
    model, lines = frozen(bundle, "classifier")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(NETWORKS[bundle][1]) for name in trained)
    total = sum(p.numel() for p in model.parameters())
    numbers = sum(trained.values()), total
    assert lines == ["--train-only classifier: {} of {} parameters are trained".format(*numbers)]
    weights.set_training(model.eval())
    assert model.training
    norms = [module for module in model.modules() if isinstance(module, weights.NORMS)]
    assert norms and not any(module.training for module in norms)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_with_norm_the_norm_layers_and_their_statistics_are_trained_too(bundle):
    model, _ = frozen(bundle, "classifier,norm")
    weights.set_training(model.eval())
    for name, module in model.named_modules():
        is_trained = isinstance(module, weights.NORMS) or (name + ".").startswith(NETWORKS[bundle][1])
        for parameter in module.parameters(recurse=False):
            assert parameter.requires_grad == is_trained, name
        assert module.training


def test_weights_of_classes_have_mean_1_over_the_images_and_each_class_the_same_sum():
    targets = np.array([0] * 6 + [1] * 3 + [3])  # class 2 has no images
    loader = type("Loader", (), {"images": types.SimpleNamespace(targets=targets), "__len__": lambda self: 10})()
    args, card = types.SimpleNamespace(class_weights="balanced"), types.SimpleNamespace(torch_device="cpu")
    found = weights.class_weights(args, loader, 4, card)
    assert found.dtype == torch.float32
    assert found[[0, 1, 3]].tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert found[targets].mean().item() == pytest.approx(1.0)
    args.class_weights = None
    assert weights.class_weights(args, loader, 4, card) is None


@pytest.mark.parametrize("bundle", [bundle for bundle in BUNDLES if bundle != "SPACH-SMLP"])
def test_the_loss_weighs_each_image_by_its_class(bundle):
    """Against torch's sum of weighted losses, by the number of images; without weights it is torch's mean loss."""
    torch.manual_seed(0)
    logits, targets = torch.randn(32, 5, requires_grad=True), torch.randint(5, (32,))
    factors = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    with imported(bundle, "main") as main:
        build = {
            "ShuffleNetV2": lambda w: main.LabelSmoothing(0.0, w),
            "PnasNet5Large": lambda w: main.AuxiliaryLoss(0.4, w),
        }.get(bundle, lambda w: main.LabelSmoothing(0.1, w))
        weighted, plain = build(factors), build(None)
    smoothing = 0.0 if bundle in ("ShuffleNetV2", "PnasNet5Large") else 0.1
    each = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    assert plain(logits, targets).item() == pytest.approx(each.mean().item())
    assert weighted(logits, targets).item() == pytest.approx((each * factors[targets]).mean().item())
    (gradient,) = torch.autograd.grad(weighted(logits, targets), logits)
    (expected,) = torch.autograd.grad((each * factors[targets]).sum() / 32, logits)
    assert torch.allclose(gradient, expected, atol=1e-7)
    if bundle == "PnasNet5Large":
        pair = weighted((logits, 2 * logits), targets).item()
        assert pair == pytest.approx((weighted(logits, targets) + 0.4 * weighted(2 * logits, targets)).item())


def main_py(bundle, *flags):
    """Run a bundle's main.py to a good end; return the finished process."""
    process = helpers.main_py(bundle, "-j", "1", *flags)
    assert process.returncode == 0, process.stdout + process.stderr
    return process


@pytest.fixture(scope="module")
def base(few_digits, tmp_path_factory):
    """Flags of a small MnasNet's training, and a file of one that was trained for an epoch."""
    out = tmp_path_factory.mktemp("base")
    flags = ["--data", few_digits, "-b", "8", "--warmup-epochs", "0", "--lr", "0.02", "-p", "5", *small("MnasNet")]
    main_py("MnasNet", *flags, "--epochs", "1", "--output-dir", out)
    return flags, out / "checkpoint.pth.tar"


def state(path):
    return checkpoint.read(str(path))["state_dict"]


@pytest.mark.parametrize("choice", ["classifier", "classifier,norm"])
def test_a_run_changes_what_is_trained_and_nothing_else_on_two_ranks_too(choice, base, tmp_path):
    flags, path = base
    words = [*flags, "--epochs", "2", "--pretrained", path, "--train-only", choice, "--device-list", "0,1"]
    process = main_py("MnasNet", *words, "--output-dir", tmp_path)
    numbers = re.search(r"^--train-only (\S+): (\d+) of (\d+) parameters are trained$", process.stdout, re.MULTILINE)
    assert numbers.group(1) == choice and 0 < int(numbers.group(2)) < int(numbers.group(3)) / 10
    before, after = state(path), state(tmp_path / "checkpoint.pth.tar")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name.rpartition(".")[0] for name in before if name.endswith("running_mean")}
    expected = {name for name in before if name.startswith("classifier.1.")}
    if "norm" in choice:
        expected |= {name for name in before if name.rpartition(".")[0] in norms}
    assert changed == expected


def test_it_is_resumed_bit_by_bit(base, tmp_path):
    flags, path = base
    words = [*flags, "--epochs", "2", "--train-only", "classifier,norm", "--class-weights", "balanced"]
    main_py("MnasNet", *words, "--pretrained", path, "--output-dir", tmp_path / "whole")
    words += ["--pretrained", path, "--resume", "auto"]
    main_py("MnasNet", *words, "--output-dir", tmp_path / "parts", "--max-steps", "13")
    process = main_py("MnasNet", *words, "--output-dir", tmp_path / "parts")
    assert "epoch 1, 24 samples done" in process.stdout
    whole, parts = (state(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_the_accuracy_of_each_class_is_exact_on_any_number_of_ranks(base, digits, tmp_path):
    """Class 3 has one image and a damaged one; one and three ranks write the same file, which adds up to Acc@1."""
    _, path = base
    shutil.copytree(str(digits / "val"), str(tmp_path / "data" / "val"))
    for image in sorted((tmp_path / "data" / "val" / "3").iterdir())[:-1]:
        image.unlink()
    (tmp_path / "data" / "val" / "3" / "damaged.jpg").write_bytes(b"no image")
    texts = []
    for ranks in ("0", "0,1,2"):
        words = ["--evaluate", "--resume", path, "--data", tmp_path / "data", "-b", "7", "--device-list", ranks]
        process = main_py("MnasNet", *words, "--per-class", tmp_path / "classes.csv")
        texts.append((tmp_path / "classes.csv").read_text())
    assert texts[0] == texts[1]
    rows = list(csv.DictReader(texts[0].splitlines()))
    assert [row["class"] for row in rows] == [str(digit) for digit in range(10)]
    folders = [tmp_path / "data" / "val" / row["class"] for row in rows]
    assert [int(row["images"]) for row in rows] == [len(list(folder.iterdir())) for folder in folders]
    assert rows[3]["images"] == "2"
    for row in rows:
        assert row["Acc@1"] == "{:.3f}".format(100 * int(row["correct"]) / int(row["images"]))
    sums = [sum(int(row[name]) for row in rows) for name in ("correct", "images")]
    assert " * Acc@1 {:.3f} ".format(100 * sums[0] / sums[1]) in process.stdout


def test_of_a_trainings_evaluations_the_last_one_stays_in_the_file(base, tmp_path):
    flags, _ = base
    words = ["--epochs", "2", "--output-dir", tmp_path, "--per-class", tmp_path / "classes.csv"]
    process = main_py("MnasNet", *flags, *words)
    *_, last = re.findall(r"^ \* Acc@1 ([\d.]+) ", process.stdout, re.MULTILINE)
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    hits = sum(int(row["correct"]) for row in rows)
    assert sum(int(row["images"]) for row in rows) == 30 and last == "{:.3f}".format(100 * hits / 30)


def test_pnasnet_is_fine_tuned_at_another_size(noise, bundle_copy, tmp_path):
    """FixRes: classifier and BatchNorm alone, at a size larger than that of the weights, by the script."""
    folder = bundle_copy("PnasNet5Large")
    with imported("PnasNet5Large") as models:
        content = {"arch": "pnasnet5large", "args": {"image_size": 64}, "classes": ["class0", "class1"]}
        content["state_dict"] = models.pnasnet5large(2).state_dict()
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, str(path))
    options = ["--data_path={}".format(noise), "--resume={}".format(path), "--image-size=96", "--lr=1e-4"]
    options += ["--train-only", "classifier,norm", "--max_steps=2", "--batch_size=4", "--workers=1", "--device=cpu"]
    process = run_script(folder, "finetune_1p", *options, "--aux-weight", "0", "--print-freq", "1")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "--train-only classifier,norm: " in process.stdout
    found = checkpoint.read(str(folder / "test" / "output" / "0" / "checkpoint.pth.tar"))
    assert found["args"]["image_size"] == 96
    before, after = state(path), found["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name.rpartition(".")[0] for name in before if name.endswith("running_mean")}
    assert "last_linear.weight" in changed
    assert {name.rpartition(".")[0] for name in changed} == norms | {"last_linear"}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--train-only", "classifier"], ["--train-only needs --pretrained FILE, or --resume FILE"]),
        (["--train-only", "classifier", "--resume", "auto"], ["--train-only needs --pretrained FILE"]),
        (["--train-only", "head"], ["--train-only", "invalid choice: 'head'", "classifier,norm"]),
        (["--class-weights", "equal"], ["--class-weights", "invalid choice: 'equal'"]),
        (["--per-class", "/nowhere/x.csv"], ["--per-class /nowhere/x.csv: not a file in a folder that is"]),
        (["--per-class", "/tmp"], ["--per-class /tmp: not a file in a folder that is there"]),
        (["--per-class", "x.csv", "--eval-freq", "0"], ["--per-class needs an evaluation of --data"]),
        (["--per-class", ""], ["--per-class", "is not a text that is not empty"]),
    ],
)
def test_what_cannot_be_is_one_line(flags, words, few_digits):
    process = helpers.main_py("MnasNet", "--data", few_digits, *flags)
    assert_refused(process, 2 if "choice" in words[-1] or len(words) > 1 else 1, *words)


def test_without_images_there_are_neither_class_weights_nor_accuracies(tmp_path):
    for flags, text in (
        (["--class-weights", "balanced"], "--class-weights needs the images of --data"),
        (["--per-class", tmp_path / "x.csv"], "--per-class needs an evaluation of --data"),
    ):
        process = helpers.main_py("MnasNet", "--synthetic", *flags)
        assert_refused(process, 1, text)
