"""Pixels and crops: those of PIL and torchvision, also of odd and of damaged files."""

import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common import transforms
from common.transforms import CenterCrop, EncodedImage, RandomResizedCrop, import_torchvision
from tests.helpers import encoded, mutated, odd_images, pattern, photograph, pil_pixels

MUTATIONS = 2000
BROKEN = ("truncated.jpg", "zero.jpg", "text.jpg", "zeros.jpg", "bomb.jpg", "bomb.png")
FORMS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "no subsampling": {"subsampling": 0},
    "restart markers": {"restart_marker_blocks": 4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("interpolation, most", [("bilinear", 1), ("bicubic", 2)])
def test_crops_are_pils_within_a_level_or_two(form, interpolation, most):
    pil_filter = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[interpolation]
    data = encoded(photograph(500, 375), quality=92, **FORMS[form])
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
    assert np.mean(differences) < 0.1 and np.max(differences) <= most


@pytest.mark.parametrize("size", [(500, 375), (300, 451), (224, 224)])
def test_the_centre_crop_is_torchvisions(size):
    theirs = import_torchvision().transforms
    data = encoded(photograph(*size), quality=92)
    crop, out = CenterCrop(224, 256), torch.empty(224, 224, 3, dtype=torch.uint8)
    crop(EncodedImage(data), out)
    steps = theirs.Compose([theirs.Resize(256), theirs.CenterCrop(224)])
    expected = np.asarray(steps(Image.open(io.BytesIO(data)).convert("RGB"))).astype(int)
    difference = np.abs(out.numpy().astype(int) - expected)
    assert difference.mean() < 0.1 and difference.max() <= 1


@pytest.mark.parametrize("size", [(30000, 1), (3, 30001)])
def test_the_centre_crop_of_a_line_takes_little_memory(size, monkeypatch):
    """All of it, resized, would be 6 GB, for which the system kills the process, and the run ends."""
    resize = transforms.resize

    def small_resize(pixels, height, width, interpolation):
        assert height * width < 1e7
        return resize(pixels, height, width, interpolation)

    monkeypatch.setattr(transforms, "resize", small_resize)
    line = photograph(*size)
    left, top = (max(0, side - 200) // 2 for side in size)
    middle, results = line.crop((left, top, size[0] - left, size[1] - top)), []
    for image in (line, middle):
        out = torch.empty(224, 224, 3, dtype=torch.uint8)
        results.append(CenterCrop(224, 256)(EncodedImage(encoded(image, "PNG")), out))
    assert (results[0].int() - results[1].int()).abs().max() <= 1


def test_without_torchs_resize_the_crop_is_pils(monkeypatch):
    """As on torch before 2.1."""
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda batch, size, mode: None)
    pixels = np.array(photograph(60, 40))
    for interpolation, pil_filter in (("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)):
        expected = np.asarray(Image.fromarray(pixels).resize((30, 20), pil_filter))
        assert np.array_equal(transforms.resize(pixels, 20, 30, interpolation).numpy(), expected)


def test_the_boxes_are_drawn_like_torchvisions():
    theirs = import_torchvision().transforms.RandomResizedCrop
    random.seed(0)
    torch.manual_seed(0)
    image, crop = Image.new("RGB", (500, 375)), RandomResizedCrop(224)
    ours = np.array([crop.box(375, 500) for _ in range(4000)], dtype=float)
    expected = [theirs.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    expected = np.array(expected, dtype=float)
    assert ours.mean(axis=0) == pytest.approx(expected.mean(axis=0), rel=0.05)
    assert ours.std(axis=0) == pytest.approx(expected.std(axis=0), rel=0.05)


def test_flip_and_augmentation():
    image = photograph(64, 64)
    data = encoded(image, "PNG")
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    out = torch.empty(64, 64, 3, dtype=torch.uint8)
    RandomResizedCrop(64, flip=1.0, **whole)(EncodedImage(data), out)
    assert np.array_equal(out.numpy(), np.asarray(image)[:, ::-1])
    darker = RandomResizedCrop(64, flip=0.0, augment=lambda picture: picture.point(lambda v: v // 2), **whole)
    darker(EncodedImage(data), out)
    assert np.array_equal(out.numpy(), np.asarray(image) // 2)


def test_random_interpolation_takes_both():
    data, out = encoded(photograph(64, 64)), torch.empty(32, 32, 3, dtype=torch.uint8)
    results = {name: set() for name in ("bilinear", "bicubic", "random")}
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
    for name, found in results.items():
        for seed in range(20):
            random.seed(seed)
            RandomResizedCrop(32, name, **whole)(EncodedImage(data), out)
            found.add(out.numpy().tobytes())
    assert results["random"] == results["bilinear"] | results["bicubic"] and len(results["random"]) == 2


def parts_of(width, height, count, draw):
    """Yield boxes (top, left, height, width): the whole, its corners, its last pixels, and any others."""
    yield 0, 0, height, width
    yield from ((0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height - 1, 0, 1, width), (0, width - 1, height, 1))
    for _ in range(count):
        h, w = draw.randint(1, height), draw.randint(1, width)
        yield draw.randint(0, height - h), draw.randint(0, width - w), h, w


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 100},
        {"quality": 5},
        {"quality": 75, "optimize": True},
        {"quality": 90, "restart_marker_blocks": 3},
        {"quality": 90, "progressive": True},
    ],
    ids=lambda options: "-".join("{}={}".format(*item) for item in options.items()),
)
def test_any_part_has_pils_pixels(subsampling, options):
    """Though the rows below it are not decoded."""
    draw = random.Random(str(options))
    for width, height in ((500, 375), (64, 48), (33, 17), (17, 95), (5, 1), (16, 16), (31, 32)):
        data = encoded(photograph(width, height, seed=width), subsampling=subsampling, **options)
        expected = pil_pixels(data)
        for box in parts_of(width, height, 20, draw):
            top, left, h, w = box
            assert np.array_equal(EncodedImage(data).pixels(box), expected[top : top + h, left : left + w]), box


def test_the_rows_below_a_crop_are_not_decoded(monkeypatch):
    decoded = []
    decode = transforms.simplejpeg.decode_jpeg

    def watched(data, *args, **options):
        decoded.append(options["buffer"].shape)
        return decode(data, *args, **options)

    monkeypatch.setattr(transforms.simplejpeg, "decode_jpeg", watched)
    thumbnail = encoded(photograph(80, 60))
    exif = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    plain = encoded(photograph(500, 375))
    for data in (plain, plain[:2] + exif + plain[2:]):  # a camera's file has a small JPEG in its header
        EncodedImage(data).pixels((10, 0, 100, 500))
    assert decoded == [(112, 500, 3)] * 2


def as_pil_decodes(data):
    """Return numpy [H, W, 3] as PIL decodes `data`, or None where it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pil_pixels(data)
    except Exception:
        return None


def as_we_decode(data):
    try:
        image = EncodedImage(data)
        pixels = image.pixels()
        assert pixels.shape == (image.height, image.width, 3)
        return pixels
    except Exception:
        return None


@pytest.mark.parametrize("name", sorted(odd_images()))
def test_odd_images_are_decoded_as_pil_does(name):
    data = odd_images()[name]
    ours, theirs = as_we_decode(data), as_pil_decodes(data)
    assert (ours is None) == (theirs is None)
    if name in BROKEN:
        assert ours is None
    elif ours is not None:
        assert np.array_equal(ours, theirs)
        for transform in (CenterCrop(32, 36), RandomResizedCrop(32), RandomResizedCrop(32, "random")):
            transform(EncodedImage(data), torch.zeros(32, 32, 3, dtype=torch.uint8))


def is_damaged(data):
    try:
        transforms.simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return True
    return False


def test_mutated_images_fail_or_give_pils_pixels():
    draw = random.Random(5)
    seeds = [encoded(pattern(), quality=q, progressive=p) for q in (60, 95) for p in (False, True)]
    seeds += [encoded(pattern("L")), encoded(pattern("CMYK")), encoded(pattern(), subsampling=0)]
    counts = {"equal": 0, "both fail": 0}
    for _ in range(MUTATIONS):
        data = mutated(draw, draw.choice(seeds))
        ours, theirs = as_we_decode(data), as_pil_decodes(data)
        if theirs is None or ours is None:
            assert ours is None and theirs is None
            counts["both fail"] += 1
        else:
            assert np.array_equal(ours, theirs)
            # The first rows of a damaged file may depend on how many are decoded; those of a good one do not.
            assert is_damaged(data) or np.array_equal(EncodedImage(data).pixels((0, 0, 20, 96)), theirs[:20])
            counts["equal"] += 1
    assert min(counts.values()) > MUTATIONS / 20, counts


def test_a_damaged_file_gives_the_same_rows_each_time():
    """Rows that the decoder left out would hold whatever was in memory."""
    draw = random.Random(6)
    seeds = [encoded(pattern(), quality=90, progressive=p) for p in (False, True)]
    for _ in range(MUTATIONS):
        data = mutated(draw, draw.choice(seeds))
        results = []
        for fill in (7, 250):
            dirt = [np.full(size, fill, dtype=np.uint8) for size in (96 * 72 * 3, 96 * 42 * 3)]
            del dirt
            try:
                results.append(EncodedImage(data).pixels((0, 0, 40, 96)))
            except Exception:
                results.append(np.zeros(0))
        assert np.array_equal(*results)
