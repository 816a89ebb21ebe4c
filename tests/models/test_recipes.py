"""The recipes: learning-rate curves, losses and augmentations against timm, torchvision and the papers."""

import math
import random
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from common import checkpoint, data
from common.errors import UserError
from common.transforms import import_torchvision
from tests.helpers import BUNDLES, ROOT, fill_, images, imported, run_script, small
from tests.tools import sample_data

import_torchvision()
from timm.data.mixup import Mixup  # noqa: E402
from timm.data.random_erasing import RandomErasing  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import ModelEmaV2  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

FLAGS = "--synthetic --device cpu --lr 0.1 --epochs 300 --wd 1e-5 -b 8 --dropout 0"


def card(world_size=8):
    """Stand in for a `Device` on which torch's plain optimizers run."""
    ranks = types.SimpleNamespace(world_size=world_size)
    build = lambda kind, parameters, **options: getattr(torch.optim, kind)(parameters, **options)  # noqa: E731
    return types.SimpleNamespace(ranks=ranks, optimizer=build)


def parse(main, *flags):
    """Return the options of a bundle's main module."""
    return main.arguments.parse(main.build_parser(), list(flags))


def recipe(bundle, *flags):
    """Return (optimizer, schedule, model) of a bundle's recipe for a small model."""
    with imported(bundle, "main") as main:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        optimizer, schedule = main.build_optimizer(parse(main, "--synthetic", *flags), card(), model)
    return optimizer, schedule, model


@pytest.mark.parametrize("bundle", ["MnasNet", "SPNASNet_100", "ShuffleNetV2"])
def test_cosine_with_a_linear_warm_up(bundle):
    optimizer, schedule, _ = recipe(bundle, "--lr", "1.4", "--epochs", "300", "--warmup-epochs", "5")
    assert schedule(0) == pytest.approx(0.14)  # a tenth
    assert schedule(2.5) == pytest.approx(0.77)  # half way between 0.14 and 1.4
    assert schedule(5) == pytest.approx(1.4)
    assert schedule(152.5) == pytest.approx(0.7)  # the middle of the cosine
    assert schedule(300 - 1 / 312) == pytest.approx(0.0, abs=1e-6)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.0 if bundle == "ShuffleNetV2" else 0.9]
    assert optimizer.param_groups[0]["nesterov"] is (bundle == "MnasNet")


COSINE = ("MnasNet", "SPNASNet_100", "ShuffleNetV2")


@pytest.mark.parametrize("bundle", COSINE)
def test_the_default_is_the_seeds_curve_digit_for_digit(bundle):
    _, schedule, _ = recipe(bundle, "--lr", "1.4", "--epochs", "300", "--warmup-epochs", "5")
    for progress in np.linspace(0, 300, 3001):
        if progress < 5:
            expected = 1.4 * (0.1 + 0.9 * progress / 5)
        else:
            expected = 1.4 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 5) / 295)))
        assert schedule(progress) == expected


@pytest.mark.parametrize("bundle", COSINE)
def test_the_curve_of_mindcv(bundle):
    """linear_refined_lr from 0 over 5 epochs, then cosine_decay_refined_lr over 445: for each step of each epoch."""
    _, schedule, _ = recipe(bundle, "--lr", "0.016", "--epochs", "450", "--warmup-start", "0")
    steps = 625
    for step in (0, 1, 1562, 3124, 3125, 3126, 100_000, 142_187, 281_000, 450 * steps - 1):
        epochs = step / steps
        expected = 0.016 * epochs / 5 if epochs < 5 else 0.008 * (1 + math.cos(math.pi * (epochs - 5) / 445))
        assert schedule(epochs) == pytest.approx(expected, rel=1e-9, abs=1e-12), step


@pytest.mark.parametrize("bundle", COSINE)
def test_the_curve_of_mmpretrain(bundle):
    """A tenth of 0.5 for 5000 steps of 1024 images, then PolyLR of power 1: a line that ends at 0."""
    flags = ["--schedule", "linear", "--warmup-method", "constant", "--warmup-epochs", "3.9964"]
    _, schedule, _ = recipe(bundle, "--lr", "0.5", "--epochs", "300", *flags)
    total = 300 * 1281167 / 1024
    for step in (0, 1, 2500, 4999, 5001, 6000, 100_000, 190_000, 300_000, int(total)):
        expected = 0.05 if step < 5000 else 0.5 * (1 - (step - 5000) / (total - 5000))
        assert schedule(step * 1024 / 1281167) == pytest.approx(expected, abs=1e-6), step


@pytest.mark.parametrize("bundle", COSINE)
def test_the_curve_of_torchvision(bundle):
    """At the epochs, where torchvision's reference changes the rate."""
    _, schedule, _ = recipe(bundle, "--lr", "0.5", "--epochs", "600", "--warmup-start", "0.01")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=595, eta_min=0.0),
    ]
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])
    for epoch in range(600):
        if epoch % 50 < 8:
            assert schedule(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-9), epoch
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("bundle", ["MnasNet", "SPNASNet_100"])
def test_rmsprop_takes_twenty_steps_of_mindspores_formula(bundle):
    """s = 0.9 s + 0.1 g^2; m = 0.9 m + lr g / sqrt(s + 1e-3); w = w - m; s begins at 1 (mindspore.nn.RMSProp)."""
    with imported(bundle, "main") as main:
        flags = ["--synthetic", "--optimizer", "rmsprop", "--lr", "0.016", "--wd", "1e-5", "--norm-weight-decay", "0"]
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm2d(4)).double()
        optimizer, _ = main.build_optimizer(parse(main, *flags), card(), model)
        parameters = list(model.parameters())
    weights = [parameter.detach().numpy().copy() for parameter in parameters]
    squares, moments = [np.ones_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for step in range(20):
        for number, parameter in enumerate(parameters):
            gradient = np.sin(weights[number] * 3 + step) * 10.0 ** -(number + step % 3)
            parameter.grad = torch.from_numpy(gradient)
            gradient = gradient + (1e-5 if number < 2 else 0.0) * weights[number]
            squares[number] = 0.9 * squares[number] + 0.1 * gradient**2
            moments[number] = 0.9 * moments[number] + 0.016 * gradient / np.sqrt(squares[number] + 1e-3)
            weights[number] = weights[number] - moments[number]
        optimizer.step()
    for parameter, expected in zip(parameters, weights):
        assert np.allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bundle", COSINE)
def test_another_weight_decay_of_norms(bundle):
    optimizer, _, model = recipe(bundle, "--wd", "4e-5", "--norm-weight-decay", "0")
    by_decay = {g["weight_decay"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
    assert by_decay == {4e-5: set(map(id, model[0].parameters())), 0.0: set(map(id, model[1].parameters()))}
    assert len(recipe(bundle, "--wd", "4e-5")[0].param_groups) == 1


@pytest.mark.parametrize("bundle", ["MnasNet", "SPNASNet_100"])
@pytest.mark.parametrize("flags", ["--optimizer nesterov", "--optimizer sgd"])
def test_with_and_without_nesterov(bundle, flags):
    optimizer, _, _ = recipe(bundle, *flags.split())
    assert optimizer.param_groups[0]["nesterov"] is (flags == "--optimizer nesterov")


def test_pnasnet_decays_by_the_epoch():
    optimizer, schedule, _ = recipe("PnasNet5Large", "--lr", "0.4")
    assert [schedule(0), schedule(0.99)] == [0.4, 0.4]
    assert schedule(89.5) == pytest.approx(0.4 * 0.97**89)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["weight_decay"] == 4e-5
    _, schedule, _ = recipe("PnasNet5Large", "--lr", "0.4", "--epochs", "90", "--schedule", "cosine")
    for epoch in (0, 45, 89, 90):  # the original's adjust_learning_rate
        assert schedule(epoch) == pytest.approx(0.2 * (1 + np.cos(np.pi * epoch / 90)))


def test_spach_follows_timms_curve_and_decays_no_norms():
    flags = ["--epochs", "310", "--cooldown-epochs", "10", "--warmup-epochs", "20", "-b", "112"]
    optimizer, schedule, model = recipe("SPACH-SMLP", *flags)
    peak = 5e-4 * 112 * 8 / 512
    assert optimizer.param_groups[0]["lr"] == pytest.approx(peak)
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    timms = CosineLRScheduler(reference, t_initial=300, lr_min=1e-5, warmup_t=20, warmup_lr_init=1e-6)
    for epoch in (0, 1, 10, 19, 20, 21, 150, 299, 300, 309):
        timms.step(epoch)
        assert schedule(epoch) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9), epoch
    by_decay = {g["weight_decay"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
    assert by_decay[0.05] == {id(model[0].weight)}
    assert by_decay[0.0] == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}


def test_the_rate_of_spach_never_rises_above_the_one_that_was_asked_for():
    """By the fine-tuning script on a CPU: 1e-4 for 512 images is 3.1e-6 for its 16, less than the lowest rate, 1e-5."""
    with imported("SPACH-SMLP", "main") as main:
        args = parse(main, *["--synthetic", "--epochs", "10", "--warmup-epochs", "1", "-b", "16", "--lr", "1e-4"])
        _, schedule = main.build_optimizer(args, card(1), torch.nn.Linear(2, 2))
    rates = [schedule(progress) for progress in np.linspace(1, 10, 91)]
    assert max(rates) == pytest.approx(1e-4 * 16 / 512) and rates == sorted(rates, reverse=True)


def test_label_smoothing_is_torchs():
    with imported("MnasNet", "main") as main:
        loss = main.LabelSmoothing(0.1, None)
    logits, targets = torch.randn(16, 10), torch.randint(10, (16,))
    assert loss(logits, targets).item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1).item(), rel=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bundle", ["MnasNet", "ShuffleNetV2"])
def test_the_loss_of_mixed_images_is_torchs(bundle, smoothing):
    with imported(bundle, "main") as main:
        loss = main.LabelSmoothing(smoothing, None)
    torch.manual_seed(0)
    logits, shares = torch.randn(16, 10), torch.rand(16, 10).softmax(dim=1)
    expected = torch.nn.functional.cross_entropy(logits, shares, label_smoothing=smoothing)
    assert loss(logits, shares).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("bundle", ["MnasNet", "ShuffleNetV2"])
def test_erasing_mixup_and_cutmix_are_torchvisions(bundle):
    """The same generators, the same images and shares; each of the two methods for half of the batches."""
    batch, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    with imported(bundle, "main") as main:
        augment = main.Augment(parse(main, *["--synthetic", "--mixup", "0.2", "--cutmix", "1"]), 10)
        erase = main.Augment(parse(main, "--synthetic", "--reprob", "0.1"), 10)
    theirs = {"MixUp": v2.MixUp(alpha=0.2, num_classes=10), "CutMix": v2.CutMix(alpha=1.0, num_classes=10)}
    taken = {"MixUp": 0, "CutMix": 0}
    for seed in range(400):
        random.seed(seed)
        torch.manual_seed(seed)
        mixed, shares = augment(batch.clone(), targets)
        for name, method in theirs.items():
            torch.manual_seed(seed)
            expected, expected_shares = method(batch.clone(), targets)
            taken[name] += torch.equal(mixed, expected) and torch.equal(shares, expected_shares)
    assert sum(taken.values()) >= 400 and 160 <= taken["CutMix"] <= 240
    torch.manual_seed(5)
    erased = erase(torch.ones(2000, 3, 32, 32), torch.zeros(2000, dtype=torch.int64))[0]
    torch.manual_seed(5)
    method = v2.RandomErasing(0.1)
    assert torch.equal(erased, torch.stack([method(torch.ones(3, 32, 32)) for _ in range(2000)]))
    assert (erased == 0).flatten(1).any(dim=1).float().mean().item() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("bundle", ["MnasNet", "ShuffleNetV2"])
def test_without_these_flags_the_batch_stays_as_it_is(bundle):
    with imported(bundle, "main") as main:
        augment = main.Augment(parse(main, "--synthetic"), 10)
    batch, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    same = augment(batch, targets)
    assert same[0] is batch and same[1] is targets


@pytest.mark.parametrize("bundle", ["MnasNet", "ShuffleNetV2"])
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--trivial-augment", "--trivial-augment: this torchvision has no TrivialAugmentWide"),
        ("--mixup 0.2", "--mixup: this torchvision has no MixUp"),
        ("--cutmix 1", "--cutmix: this torchvision has no CutMix"),
    ],
)
def test_an_old_torchvision_is_one_line(bundle, flags, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with imported(bundle, "main") as main, pytest.raises(UserError) as refused:
        parse(main, "--synthetic", *flags.split())
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "bundle, flags, words",
    [
        ("MnasNet", "--mixup 0.2 --class-weights balanced", "--class-weights"),
        ("SPNASNet_100", "--optimizer rmsprop --fused-optimizer on", "--fused-optimizer"),
    ],
)
def test_what_contradicts_each_other_is_refused(bundle, flags, words):
    with imported(bundle, "main") as main, pytest.raises(UserError) as refused:
        parse(main, "--synthetic", *flags.split())
    assert words in str(refused.value)


@pytest.mark.parametrize("bundle", ["MnasNet", "ShuffleNetV2"])
def test_val_is_measured_at_its_own_size(bundle):
    with imported(bundle, "main") as main:
        sizes = {}
        for flags in ("", "--image-size 176", "--image-size 176 --val-size 224 --val-resize 232"):
            crop = main.val_crop(parse(main, "--synthetic", *flags.split()))
            sizes[flags] = crop.size, crop.resize
    assert list(sizes.values()) == [(224, 256), (176, 201), (224, 232)]


def _erased_boxes(erase, count, size=64):
    """Return (share of images erased, mean area share, mean |log aspect|) of `count` constant images."""
    areas, ratios = [], []
    for _ in range(count // 50):
        batch = erase(torch.full((50, 3, size, size), 9.0))
        for image in (batch != 9.0).any(dim=1):
            rows, columns = image.any(dim=1).sum().item(), image.any(dim=0).sum().item()
            if rows:
                areas.append(rows * columns / size**2)
                ratios.append(abs(math.log(rows / columns)))
    return len(areas) / count, np.mean(areas), np.mean(ratios)


@pytest.mark.parametrize("bundle, probability", [("SPNASNet_100", 0.5), ("SPACH-SMLP", 0.25)])
def test_random_erasing_draws_timms_boxes(bundle, probability):
    random.seed(1)
    torch.manual_seed(1)
    with imported(bundle, "main") as main:
        ours = _erased_boxes(main.RandomErasing(probability), 4000)
    timms = _erased_boxes(RandomErasing(probability, mode="pixel", device="cpu"), 4000)
    assert (ours[0], timms[0]) == pytest.approx((probability, probability), abs=0.03)
    assert ours[1:] == pytest.approx(timms[1:], rel=0.1)


def test_random_erasing_is_noise_per_pixel():
    with imported("SPNASNet_100", "main") as main:
        batch = main.RandomErasing(1.0)(torch.full((40, 3, 64, 64), 9.0))
    noise = batch[batch != 9.0]
    assert abs(noise.mean().item()) < 0.02 and noise.std().item() == pytest.approx(1.0, abs=0.02)


class Copies(TorchDispatchMode):
    """Counts copies from one device to another, for which a card's queue would have to end."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += len({item.device for item in args if isinstance(item, torch.Tensor)}) > 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bundle", ["SPNASNet_100", "SPACH-SMLP", "MnasNet", "ShuffleNetV2"])
def test_random_erasing_copies_nothing_to_the_card(bundle):
    with imported(bundle, "main") as main:
        erase = getattr(main, "RandomErasing", lambda share: None)(1.0)
        if erase is None:
            augment = main.Augment(parse(main, "--synthetic", "--reprob", "1"), 10)
            erase = lambda images: augment(images, None)  # noqa: E731
    with Copies() as copies:
        erase(torch.ones(8, 3, 64, 64, device="meta"))  # a device that is not the CPU, with no memory
    assert copies.count == 0


@pytest.mark.parametrize("count", [8, 7])
def test_mixup_targets_are_timms(count):
    with imported("SPACH-SMLP", "main") as main:
        augment = main.Augment(parse(main, "--synthetic", "--reprob", "0"), 10)
    batch, targets = torch.randn(count, 3, 16, 16), torch.arange(count) % 10
    np.random.seed(3)
    mixed, soft = augment(batch.clone(), targets)
    np.random.seed(3)
    even = count // 2 * 2
    timms = Mixup(0.8, 1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=10)
    expected_images, expected = timms(batch[:even].clone(), targets[:even])
    assert torch.equal(mixed[:even], expected_images) and torch.equal(soft[:even], expected)
    assert soft.shape == (count, 10)
    assert torch.allclose(soft.sum(dim=1), torch.ones(count))
    if count % 2:
        assert torch.equal(mixed[-1], batch[-1])
        assert soft[-1].max().item() == pytest.approx(0.9 + 0.1 / 10)


@pytest.mark.parametrize("policy", ["rand-m0", "rand-m2", "rand-m2-inc1", "rand-m9-mstd101"])
def test_posterize_keeps_a_bit_at_any_magnitude(policy):
    with imported("SPACH-SMLP", "main") as main:
        operations = main.build_augment(types.SimpleNamespace(aa=policy, image_size=64)).ops
    strengths = [op.level_fn(level / 10, {}) for op in operations if op.name[:9] == "Posterize" for level in range(101)]
    assert strengths and min(bits for (bits,) in strengths) >= 1


@pytest.mark.parametrize("bundle", ["SPACH-SMLP", *COSINE])
def test_the_average_of_weights_and_buffers_is_timms(bundle):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with imported(bundle, "main") as main:
        average = main.AveragedWeights(model, 0.9)
    theirs = ModelEmaV2(model, decay=0.9)
    for _ in range(10):
        model(torch.randn(4, 3, 8, 8) + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        theirs.update(model)
    state, expected = average.model.state_dict(), theirs.module.state_dict()
    assert all(torch.allclose(state[name], expected[name], atol=1e-6) for name in state if "batches" not in name)
    assert state["1.num_batches_tracked"] == 10
    assert not torch.allclose(state["0.weight"], model[0].weight)


def test_the_auxiliary_loss():
    with imported("PnasNet5Large", "main") as main:
        criterion = main.AuxiliaryLoss(0.4, None)
    logits, aux, targets = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert criterion(logits, targets) == expected
    expected = expected + 0.4 * torch.nn.functional.cross_entropy(aux, targets)
    assert torch.allclose(criterion((logits, aux), targets), expected)


@pytest.mark.parametrize("memory_format", ["contiguous", "auto"])
def test_twenty_steps_follow_torchvision_in_a_plain_loop(memory_format, monkeypatch):
    """Equal weights, equal batches, the same recipe: the losses agree to 1e-5."""
    from common import device, logger
    from common.precision import Precision

    batches = [(images(8, 64).float() + 0.1 * step, torch.arange(8) * 7 % 10) for step in range(20)]
    reference = import_torchvision().models.mnasnet1_0(num_classes=10)
    with imported("MnasNet", "main") as main:
        args = parse(main, *FLAGS.split(), "--memory-format", memory_format)
        processor = device.Device(args)
        model = main.models.mnasnet1_0(10, dropout=0.0, bn_momentum=0.1)
        fill_(model)
        reference.load_state_dict(model.state_dict())
        model = processor.prepare(model)
        log = logger.Log(processor, args, "MnasNet")
        losses = []
        monkeypatch.setattr(log, "step", lambda loss, *others: losses.append(loss.item()) or 0)
        optimizer, schedule = main.build_optimizer(args, processor, model)
        nothing = types.SimpleNamespace(samples=0, after_step=lambda batch, stop_signal: None)
        precision = Precision(processor, args, model, optimizer)
        criterion = main.LabelSmoothing(0.1, None)
        loader = _Loader(batches)
        augment = main.Augment(args, 10)
        main.train_one_epoch(loader, 0, model, augment, criterion, optimizer, schedule, precision, None, log, nothing)

    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    reference.classifier[0].p = 0.0
    layout = torch.contiguous_format if memory_format == "contiguous" else torch.channels_last
    reference.to(memory_format=layout)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-5, nesterov=True)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = []
    for step, (batch, targets) in enumerate(batches):
        plain.param_groups[0]["lr"] = 0.1 * (0.1 + 0.9 * (step / 20) / 5)
        loss = criterion(reference(batch.contiguous(memory_format=layout)), targets)
        plain.zero_grad()
        loss.backward()
        plain.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)


class _Loader:
    """Twenty given batches, in the form of a `data.Loader`."""

    batch_size, world, steps, wait_seconds, new_bad = 8, 1, 20, 0.0, ()

    def __init__(self, batches):
        self._batches, self.bad = batches, {}

    def __len__(self):
        return 160

    def steps_from(self, samples):
        return 20

    def batches(self, epoch, start):
        for step, (pixels, targets) in enumerate(self._batches):
            yield data.Batch(pixels, targets, 1.0, epoch + step / 20, 8 * (step + 1))


def test_rmsprop_and_the_average_resume_to_the_bit(mnasnet, few_digits, tmp_path):
    flags = "--arch mnasnet0_5 --image-size 32 -b 8 -j 1 --device cpu --epochs 2"
    flags += " --optimizer rmsprop --lr 0.01 --norm-weight-decay 0 --ema-decay 0.9 --eval-ema --mixup 0.2 --reprob 0.5"
    words = [*flags.split(), "--data", few_digits, "--eval-freq", "0"]
    for folder, steps in (("whole", [4]), ("parts", [2, 4])):
        for count in steps:
            more = ["--resume", tmp_path / folder / "checkpoint.pth.tar"] if count != steps[0] else []
            command = [*words, *more, "--max-steps", str(count), "--output-dir", tmp_path / folder]
            status, text = mnasnet.run(command, tmp_path / "log")
            assert status == 0, text
    whole, parts = (checkpoint.read(str(tmp_path / name / "checkpoint.pth.tar")) for name in ("whole", "parts"))
    for name in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name])
    states = [content["rmsprop"]["state"] for content in (whole, parts)]
    assert all(torch.equal(states[0][n][key], states[1][n][key]) for n in states[0] for key in states[0][n])
    assert not torch.equal(whole["state_dict"]["layers.0.weight"], whole["state_dict_ema"]["layers.0.weight"])
    path = tmp_path / "whole" / "checkpoint.pth.tar"
    status, text = mnasnet.run([*words, "--optimizer", "sgd", "--resume", path, "--no-save"], tmp_path / "log")
    assert status == 1 and "{} has no optimizer: --pretrained takes its weights".format(path) in text


def commands_of(bundle, name):
    """Return the commands in the section "Higher accuracy" of a bundle's README.md or README_zh.md."""
    text = (ROOT / bundle / name).read_text(encoding="utf-8")
    section = re.split(r"^#+ (?:Higher accuracy|更高精度)\n", text, flags=re.MULTILINE)[1]
    section = re.split(r"^#+ (?:Arguments|参数说明)\n", section, flags=re.MULTILINE)[0]
    return re.findall(r"^bash test/train_(\w+)_(\d)p\.sh (.*)$", section, re.MULTILINE)


def number_of(option, words):
    found = re.findall("--{}[= ](\\S+)".format(option), words)
    return int(found[-1]) if found else 1


@pytest.mark.parametrize("bundle", BUNDLES)
def test_both_languages_give_the_same_commands_for_eight_cards_and_for_one(bundle):
    commands = commands_of(bundle, "README.md")
    assert commands and commands == commands_of(bundle, "README_zh.md")
    for eight, one in zip(commands[::2], commands[1::2]):
        assert (eight[1], one[1]) == ("8", "1") and eight[0] == one[0]
        without = [re.sub(r" --accumulate \d+", "", words) for words in (eight[2], one[2])]
        assert without[0] == without[1]
        images = [number_of("batch_size", words) * number_of("accumulate", words) for words in (eight[2], one[2])]
        assert images[0] * 8 == images[1]


def test_the_command_of_microsofts_accuracy_ends_after_300_epochs_as_its_loop_does():
    """main.py of microsoft/SPACH leaves the number of epochs that its scheduler returns, 310, out of account."""
    commands = [words for _, _, words in commands_of("SPACH-SMLP", "README.md")]
    assert len(commands) == 2
    for words in commands:
        assert number_of("epochs", words) == 300 and number_of("cooldown-epochs", words) == 0


def test_the_rate_of_fixres_is_eight_times_that_of_its_command():
    """imnet_finetune/train.py: 8 x --learning-rate x global batch / 512, and a weight decay of 1e-4."""
    commands = [words for _, _, words in commands_of("PnasNet5Large", "README.md") if "--image-size 480" in words]
    assert len(commands) == 2
    for words in commands:
        (rate,) = re.findall(r"--learning_rate=(\S+)", words)
        assert float(rate) == pytest.approx(8 * 1e-4 * 512 / 512)
        assert "--weight-decay 1e-4" in words


CASES = [(bundle, *words[::2]) for bundle in BUNDLES for words in commands_of(bundle, "README.md")[1::2]]


@pytest.mark.parametrize("bundle, mode, words", CASES, ids=lambda value: str(value)[-40:])
def test_a_command_of_the_readme_trains(bundle, mode, words, few_digits, bundle_copy, tmp_path):
    """Its flags for two steps, with a smaller network and smaller images."""
    less = ["--epochs=1", "--max_steps=2", "--batch_size=4", "--accumulate", "2", "--workers=1", *small(bundle)]
    flags = [re.sub("^--data_path=.*", "--data_path={}".format(few_digits), word) for word in words.split()]
    if mode == "finetune":
        with imported(bundle) as models:
            state = models.pnasnet5large(1000, zero_pad=True).state_dict()
        torch.save(state, str(tmp_path / "official.pth"))
        flags = [re.sub("^--resume=.*", "--resume={}".format(tmp_path / "official.pth"), word) for word in flags]
    process = run_script(bundle_copy(bundle), mode + "_1p", *flags, *less, "--device=cpu", "--no-save")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Final Train Accuracy" in process.stdout


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """The digits split in two ways: the last and the first 300 are measured."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("last", "first")}
    sample_data.write(folders["last"])
    images = sorted(folders["last"].rglob("*.jpg"), key=lambda path: path.name)
    for number, path in enumerate(images):
        target = folders["first"] / ("val" if number < 300 else "train") / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(path), str(target))
    return folders


@pytest.mark.slow  # trains a network on all digits up to six times: up to half an hour for each
@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("split, seeds", [("last", range(5)), ("first", range(1))])
def test_the_command_for_a_small_set_reaches_90(bundle, split, seeds, splits, bundle_copy):
    text = (ROOT / bundle / "README.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"^bash test/train_full_1p\.sh --data_path=\.\./data/digits (.*)$", text, re.MULTILINE)
    folder = bundle_copy(bundle)
    for seed in seeds:
        options = [*words.split(), "--seed", seed, "--device=cpu", "--no-save"]
        process = run_script(folder, "full_1p", "--data_path", splits[split], *options, timeout=3600)
        assert process.returncode == 0, process.stdout + process.stderr
        assert float(re.findall(r"Final Train Accuracy : ([\d.]+)", process.stdout)[-1]) >= 90, (split, seed)
