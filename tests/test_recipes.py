"""The recipes: learning-rate curves, losses and augmentations against timm, torchvision and the papers."""

import math
import random
import types

import numpy as np
import pytest
import torch

from common import data
from common.transforms import import_torchvision
from tests.bundles import imported
from tests.deterministic import fill_, images

import_torchvision()
from timm.data.mixup import Mixup  # noqa: E402
from timm.data.random_erasing import RandomErasing  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402

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


def test_pnasnet_decays_by_the_epoch():
    optimizer, schedule, _ = recipe("PnasNet5Large", "--lr", "0.4")
    assert [schedule(0), schedule(0.99)] == [0.4, 0.4]
    assert schedule(89.5) == pytest.approx(0.4 * 0.97**89)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["weight_decay"] == 4e-5


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


def test_label_smoothing_is_torchs():
    with imported("MnasNet", "main") as main:
        loss = main.LabelSmoothing(0.1)
    logits, targets = torch.randn(16, 10), torch.randint(10, (16,))
    assert loss(logits, targets).item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1).item(), rel=1e-6
    )


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


def test_the_averaged_weights():
    model = torch.nn.Linear(2, 2)
    with imported("SPACH-SMLP", "main") as main:
        average = main.AveragedWeights(model, 0.9)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()
    assert torch.allclose(average.model.weight, before + 0.1)


def test_the_auxiliary_loss():
    with imported("PnasNet5Large", "main") as main:
        criterion = main.AuxiliaryLoss(0.4)
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
        criterion = main.LabelSmoothing(0.1)
        loader = _Loader(batches)
        main.train_one_epoch(loader, 0, model, criterion, optimizer, schedule, precision, log, nothing)

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

    batch_size, world, steps, wait_seconds, new_bad = 8, 1, 20, 0.0, 0

    def __init__(self, batches):
        self._batches, self.bad, self.unnamed = batches, {}, []

    def __len__(self):
        return 160

    def steps_from(self, samples):
        return 20

    def batches(self, epoch, start):
        for step, (pixels, targets) in enumerate(self._batches):
            yield data.Batch(pixels, targets, 1.0, epoch + step / 20, 8 * (step + 1))
