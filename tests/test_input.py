"""Crops, order and batches: against torchvision, PIL, and each other."""

import io
import random
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from common import device
from common.decode import CenterCrop, EncodedImage, JpegHeader, RandomResizedCrop
from common.errors import UserError
from common.input import ImageFolder, Loader, epoch_order, import_torchvision_transforms
from common.ranks import Ranks
from common.workers import PADDING
from tests.bundles import ROOT
from tests.conftest import run

transforms = import_torchvision_transforms()


def photograph(width, height, seed=0):
    """Return a PIL image with structure at every scale, as photographs have."""
    generator = np.random.RandomState(seed)
    layers = np.zeros((height, width, 3))
    for size in (4, 16, 64, 256):
        noise = Image.fromarray(generator.randint(0, 256, (size, size, 3)).astype(np.uint8))
        layers += np.asarray(noise.resize((width, height), Image.BICUBIC), dtype=float)
    return Image.fromarray((layers / 4).astype(np.uint8))


def jpeg(image, **options):
    """Return the bytes of `image` as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", **dict({"quality": 92}, **options))
    return file.getvalue()


FORMS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "no subsampling": {"subsampling": 0},
    "restart markers": {"restart_marker_blocks": 4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_pils_within_a_tenth_of_a_level(form, interpolation):
    pil_filter = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[interpolation]
    data = jpeg(photograph(500, 375), **FORMS[form])
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    crop = RandomResizedCrop(224, interpolation, flip=0.0)
    out = torch.empty(224, 224, 3, dtype=torch.uint8)
    differences = []
    for seed in range(12):
        random.seed(seed)
        top, left, height, width = crop.box(375, 500)
        expected = decoded.crop((left, top, left + width, top + height)).resize((224, 224), pil_filter)
        random.seed(seed)
        crop(EncodedImage(data), out)
        differences.append(np.abs(out.numpy().astype(int) - np.asarray(expected).astype(int)))
    assert np.mean(differences) < 0.1 and np.max(differences) <= 2


@pytest.mark.parametrize("size", [(500, 375), (300, 451), (224, 224)])
def test_the_centre_crop_is_torchvisions(size):
    data = jpeg(photograph(*size))
    crop, out = CenterCrop(224, 256), torch.empty(224, 224, 3, dtype=torch.uint8)
    crop(EncodedImage(data), out)
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    expected = np.asarray(theirs(Image.open(io.BytesIO(data)).convert("RGB"))).astype(int)
    difference = np.abs(out.numpy().astype(int) - expected)
    assert difference.mean() < 0.1 and difference.max() <= 2


def test_the_boxes_are_drawn_like_torchvisions():
    crop = RandomResizedCrop(224)
    random.seed(0)
    torch.manual_seed(0)
    image = Image.new("RGB", (500, 375))
    ours = np.array([crop.box(375, 500) for _ in range(4000)], dtype=float)
    get_params = transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)], dtype=float)
    assert ours.mean(axis=0) == pytest.approx(theirs.mean(axis=0), rel=0.05)
    assert ours.std(axis=0) == pytest.approx(theirs.std(axis=0), rel=0.05)


def test_flip_and_augmentation():
    image = photograph(64, 64)
    data = io.BytesIO()
    image.save(data, "PNG")
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    out = torch.empty(64, 64, 3, dtype=torch.uint8)
    RandomResizedCrop(64, flip=1.0, **whole)(EncodedImage(data.getvalue()), out)
    assert np.array_equal(out.numpy(), np.asarray(image)[:, ::-1])
    darker = RandomResizedCrop(64, flip=0.0, augment=lambda picture: picture.point(lambda v: v // 2), **whole)
    darker(EncodedImage(data.getvalue()), out)
    assert np.array_equal(out.numpy(), np.asarray(image) // 2)


def test_the_header_of_a_jpeg():
    header = JpegHeader.parse(jpeg(photograph(123, 77)))
    assert (header.width, header.height) == (123, 77)
    assert JpegHeader.parse(jpeg(photograph(20, 20))[:-30]) is None  # truncated: PIL decides
    assert JpegHeader.parse(b"\x89PNG") is None


def test_the_order_is_a_function_of_seed_and_epoch():
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 3))
    assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 2, 2))
    repeated = epoch_order(50, 1, 2, repeats=3)
    assert np.array_equal(repeated[::3], epoch_order(50, 1, 2)) and np.array_equal(repeated[::3], repeated[2::3])


def processor(rank=0, world_size=1):
    """Stand in for a `Device` of rank `rank`."""
    ranks = Ranks()
    ranks.agree = lambda number=0: number  # the other ranks are not there
    ranks.rank, ranks.world_size, ranks.local_world_size = rank, world_size, world_size
    return types.SimpleNamespace(
        torch_device=torch.device("cpu"), ranks=ranks, likes_channels_last=True, upload=torch.Tensor.clone
    )


def loader(folder, training, rank=0, world_size=1, batch_size=7, workers=0):
    """Return a `Loader` of the digits as rank `rank` sees it."""
    args = types.SimpleNamespace(batch_size=batch_size, workers=workers, seed=5, max_bad_images=0.0)
    crop = RandomResizedCrop(32) if training else CenterCrop(32, 36)
    images = ImageFolder(str(folder), "train" if training else "val")
    return Loader(processor(rank, world_size), images, crop, args, (0.5,) * 3, (0.25,) * 3, training=training)


def collected(batches):
    """Return the list of `batches`, each with images of its own."""
    return [(images.clone(), targets) for images, targets in batches]


def test_the_folder_is_torchvisions(few_digits):
    from torchvision.datasets import ImageFolder as Theirs

    for split in ("train", "val"):
        ours, theirs = ImageFolder(str(few_digits), split), Theirs(str(few_digits / split))
        assert ours.classes == theirs.classes
        assert [(ours.path(i), t) for i, t in enumerate(ours.targets)] == theirs.samples


def test_workers_change_nothing(few_digits):
    alone, three = (collected(loader(few_digits, True, workers=workers).batches(epoch=1)) for workers in (0, 3))
    assert len(alone) == len(three) == 12  # 80 images in batches of 7: the last has 3
    for (images, targets), (other_images, other_targets) in zip(alone, three):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_ranks_share_an_epoch_and_draw_the_same_crops(few_digits):
    (whole,) = [torch.cat([images for images, _ in collected(loader(few_digits, True, batch_size=8).batches(epoch=3))])]
    parts = [collected(loader(few_digits, True, rank, 4, batch_size=2).batches(epoch=3)) for rank in range(4)]
    for step in range(10):
        together = torch.stack([parts[rank][step][0] for rank in range(4)], dim=1).flatten(0, 1)
        assert torch.equal(together, whole[step * 8 : step * 8 + 8])


def test_evaluation_counts_every_image_once_and_pads(few_digits):
    targets = []
    for rank in range(4):
        batches = list(loader(few_digits, False, rank, 4, batch_size=5).batches())
        assert [images.shape[0] for images, _ in batches] == [5, 5]
        targets.append(torch.cat([t for _, t in batches]))
    counted = torch.cat(targets)
    assert sorted(counted[counted >= 0].tolist()) == sorted(list(range(10)) * 3)
    assert (counted == PADDING).sum().item() == 40 - 30


def test_normalisation(few_digits):
    images, _ = next(iter(loader(few_digits, False).batches()))
    first = ImageFolder(str(few_digits), "val").path(0)
    out = torch.empty(32, 32, 3, dtype=torch.uint8)
    with open(first, "rb") as file:
        CenterCrop(32, 36)(EncodedImage(file.read()), out)
    expected = (out.permute(2, 0, 1) / 255.0 - 0.5) / 0.25
    assert torch.allclose(images[0], expected, atol=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_more_workers_than_cores_are_no_news(few_digits):
    code = """
import sys
sys.argv = ["test"]
from tests.test_input import loader
for _ in loader({!r}, True, workers=5).batches():
    pass
"""
    process = run([sys.executable, "-c", code.format(str(few_digits))], cwd=ROOT)
    assert process.returncode == 0 and process.stderr == ""


@pytest.mark.parametrize("kind, why", [("npu", "is for CUDA and CPU"), ("cpu", "needs a C")])
def test_compiling_where_it_cannot_work_is_refused(kind, why, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="--compile.*" + why):
        device._check_compiler(kind)
