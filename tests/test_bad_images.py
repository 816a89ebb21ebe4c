"""Images that are damaged, odd or no images: decoded as PIL decodes them, or replaced, counted and named."""

import io
import json
import os
import random
import re
import socket
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common import decode, input
from common.decode import CenterCrop, EncodedImage, RandomResizedCrop
from common.errors import UserError
from common.folder import ImageFolder
from common.ranks import Ranks
from common.workers import UNREADABLE
from tests import chaos
from tests.test_input import collected

MUTATIONS = 2000
SIDE = 32


def photograph(mode="RGB", size=(96, 72)):
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 2 + y, 255 - x, 128 + 60 * np.sin(x / 9.0) * np.cos(y / 7.0)], 2)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_images():
    """Return {name: bytes} of files that are unusual and fine, or broken."""
    rgb, grey = photograph(), photograph("L")
    jpeg = encoded(rgb, quality=90)
    palette = rgb.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    frames = [rgb, rgb.rotate(90), grey.convert("RGB")]
    header = jpeg.index(b"\xff\xc0")
    bomb = jpeg[: header + 5] + (20000).to_bytes(2, "big") * 2 + jpeg[header + 9 :]
    sixteen = Image.fromarray((np.arange(96 * 72).reshape(72, 96) * 9).astype(np.uint16))
    return {
        "plain.jpg": jpeg,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated_with_end.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "zero.jpg": b"",
        "text.jpg": b"this is a web page",
        "zeros.jpg": bytes(5000),
        "png_called.jpg": encoded(rgb, "PNG"),
        "jpeg_called.png": jpeg,
        "cmyk.jpg": encoded(photograph("CMYK")),
        "grey.jpg": encoded(grey),
        "progressive.jpg": encoded(rgb, progressive=True),
        "trailing.jpg": jpeg + b"\0" * 100,
        "rotated.jpg": encoded(rgb, exif=exif),
        "444.jpg": encoded(rgb, subsampling=0),
        "restart.jpg": encoded(rgb, restart_marker_blocks=2),
        "sixteen_bit.png": encoded(sixteen, "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "palette_bytes.png": encoded(palette, "PNG", transparency=bytes(range(16))),
        "alpha.png": encoded(rgb.convert("RGBA"), "PNG"),
        "one_bit.png": encoded(photograph("1"), "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "pages.tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "float.tiff": encoded(photograph("F"), "TIFF"),
        "one_pixel.jpg": encoded(photograph(size=(1, 1))),
        "one_column.png": encoded(photograph(size=(1, 300)), "PNG"),
        "one_row.jpg": encoded(photograph(size=(300, 1))),
        "bomb.jpg": bomb,
        "bomb.png": encoded(Image.new("1", (20000, 20000)), "PNG"),
    }


def as_pil_decodes(data):
    """Return numpy [H, W, 3] as `Image.open(...).convert("RGB")` gives it, or None where it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
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
    if name in ("truncated.jpg", "zero.jpg", "text.jpg", "zeros.jpg", "bomb.jpg", "bomb.png"):
        assert ours is None
    elif ours is not None:
        assert np.array_equal(ours, theirs)
        for transform in (CenterCrop(SIDE, 36), RandomResizedCrop(SIDE), RandomResizedCrop(SIDE, "random")):
            transform(EncodedImage(data), torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8))


def is_damaged(data):
    try:
        decode.simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return True
    return False


def mutated(draw, data):
    """Return `data` with flipped bytes, a cut, a repeated piece, or a changed header."""
    data = bytearray(data)
    kind = draw.randrange(5)
    if kind == 0:
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[draw.randrange(len(data)) :]
    elif kind == 2:
        start = draw.randrange(len(data))
        del data[start : start + draw.randrange(1, 50)]
    elif kind == 3:
        start = draw.randrange(len(data))
        data[start:start] = data[start : start + draw.randrange(1, 200)]
    else:
        data[draw.randrange(2, min(700, len(data)))] = draw.randrange(256)
    return bytes(data)


def test_mutated_images_fail_or_give_pils_pixels():
    draw = random.Random(5)
    seeds = [encoded(photograph(), quality=q, progressive=p) for q in (60, 95) for p in (False, True)]
    seeds += [encoded(photograph("L")), encoded(photograph("CMYK")), encoded(photograph(), subsampling=0)]
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
    seeds = [encoded(photograph(), quality=90, progressive=p) for p in (False, True)]
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


def set_of(folder, files):
    for split in ("train", "val"):
        place = folder / split / "class"
        place.mkdir(parents=True)
        for name, data in files.items():
            (place / name).write_bytes(data)
    return ImageFolder(str(folder), "train")


def loader(images, training, workers=2, batch=4, share=1.0, rank=0, world=1):
    ranks = Ranks()
    ranks.agree = lambda number=0: number
    ranks.rank, ranks.world_size, ranks.local_world_size = rank, world, world
    device = types.SimpleNamespace(
        torch_device=torch.device("cpu"), ranks=ranks, likes_channels_last=True, upload=torch.Tensor.clone
    )
    args = types.SimpleNamespace(batch_size=batch, workers=workers, seed=3, max_bad_images=share)
    transform = RandomResizedCrop(SIDE) if training else CenterCrop(SIDE, 36)
    return input.Loader(device, images, transform, args, (0.5,) * 3, (0.25,) * 3, training=training)


@pytest.fixture
def odd_set(tmp_path, monkeypatch):
    """A set with every odd image, and what is no file: a folder, links into nowhere and into a loop, a pipe, ..."""
    files = odd_images()
    files.update(("mutated{:04d}.jpg".format(i), mutated(random.Random(i), files["plain.jpg"])) for i in range(200))
    root = tmp_path / "set"
    set_of(root, files)
    for split in ("train", "val"):
        place = root / split / "class"
        (place / "folder.jpg").mkdir()
        (place / "dangling.jpg").symlink_to("nowhere")
        (place / "loop.jpg").symlink_to("loop.jpg")
        (place / "device.jpg").symlink_to("/dev/zero")
        os.mkfifo(str(place / "pipe.jpg"))
        unix = socket.socket(socket.AF_UNIX)
        monkeypatch.chdir(place)  # a socket's path has to be short
        unix.bind("socket.jpg")
        (place / "forbidden.jpg").write_bytes(files["plain.jpg"])
        os.chmod(str(place / "forbidden.jpg"), 0)
    return root


def expected_bad(images):
    bad = set()
    for index in range(len(images)):
        path = images.path(index)
        readable = os.path.isfile(path) and os.access(path, os.R_OK)
        if not readable or as_pil_decodes(open(path, "rb").read()) is None:
            bad.add(index)
    return bad


def test_evaluation_counts_what_it_cannot_read(odd_set):
    """Each file is accounted for, and nothing stands in for another; the next evaluation counts anew."""
    images = ImageFolder(str(odd_set), "val")
    assert not any(images.path(index).endswith("folder.jpg") for index in range(len(images)))
    expected = expected_bad(images)
    assert len(expected) > 12
    item = loader(images, training=False)
    for _ in range(2):
        targets = torch.cat([targets for _, targets in item.batches()])
        assert item.bad == expected
        assert (targets == UNREADABLE).sum().item() == len(expected)
        assert (targets >= 0).sum().item() == len(images) - len(expected)
    names = [name for name, _ in item.unnamed]
    assert sorted(names) == sorted(images.path(index) for index in expected)  # once each
    os.remove(images.path(min(expected)))
    with open(images.path(min(expected)), "wb") as file:
        file.write(odd_images()["plain.jpg"])
    list(item.batches())
    assert item.bad == expected - {min(expected)}


def test_training_replaces_deterministically(odd_set):
    images = ImageFolder(str(odd_set), "train")
    results = []
    for workers in (0, 2):
        item = loader(images, True, workers)
        batches = collected(item.batches(epoch=1))
        results.append((torch.cat([pixels for pixels, _ in batches]), item.bad, [name for name, _ in item.unnamed]))
        assert all((targets >= 0).all() for _, targets in batches)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    # A crop is decoded from the rows it needs: damage below them is not met.
    missed = expected_bad(images) - results[0][1]
    assert results[0][1] <= expected_bad(images) and len(missed) < 30
    assert all("mutated" in images.path(index) for index in missed)
    assert sorted(results[0][2]) == sorted(results[1][2]) and len(set(results[0][2])) == len(results[0][2])


def test_the_budget(tmp_path):
    """As many as it allows are replaced; one more ends the run with the list."""
    plain = odd_images()["plain.jpg"]
    files = {"{:03d}.jpg".format(i): plain if i % 10 else b"" for i in range(60)}
    images = set_of(tmp_path, files)
    item = loader(images, True, share=0.1)
    assert len(list(item.batches())) == 15 and len(item.bad) == 6
    item = loader(images, True, share=0.09)
    with pytest.raises(UserError, match=r"6 images of .* cannot be read, more than --max-bad-images 5.4") as caught:
        list(item.batches())
    assert str(caught.value).count(".jpg") == 6


def test_a_set_without_a_single_image_ends_at_once(tmp_path):
    images = set_of(tmp_path, {"{:05d}.jpg".format(i): b"" for i in range(5000)})
    reads = []
    images.read = lambda index, read=images.read: reads.append(index) or read(index)
    with pytest.raises(UserError, match="cannot be read, more than"):
        list(loader(images, True, workers=0, share=0.001).batches())
    assert len(reads) < 100


def test_names_cannot_write_into_the_log(tmp_path):
    """Class and file names with line feeds, tabs, escapes, and bytes that are no UTF-8."""
    plain = odd_images()["plain.jpg"]
    classes = [b"a\nEpoch: [9]", b"b\t * Acc@1 99.9", b"c\x1b[2J", b"d\xff\xfe", "e\u202e".encode()]
    root = os.fsencode(str(tmp_path / "set"))
    for split in (b"train", b"val"):
        for name in classes:
            folder = os.path.join(root, split, name)
            os.makedirs(folder)
            for number in range(4):
                with open(os.path.join(folder, b"%d\n=> result {}\xff.jpg" % number), "wb") as file:
                    file.write(b"" if number == 3 else plain)
    server = chaos.Server("MnasNet")
    words = chaos.flags("MnasNet", tmp_path / "set", tmp_path, "--epochs", "1", "--max-bad-images", "0.3")
    words += ["--log-dir", tmp_path / "log"]
    status, text = server.run(words, tmp_path / "screen")
    assert status == 0, text
    status, again = server.run([*words, "--resume", "auto"], tmp_path / "screen")
    server.close()
    assert status == 0, again
    for written in (text, (tmp_path / "log" / "train_0.log").read_text()):
        lines = written.splitlines()
        assert all(line.replace("\t", "").isprintable() for line in lines)
        assert len([line for line in lines if line.startswith("Epoch: [9]")]) == 0
        assert not [line for line in lines if line.startswith(("=> result {}", " * Acc@1 99.9"))]
    assert not [line for line in text.splitlines() if line.startswith("[Warning]") and "\t" in line]
    assert len(re.findall(r"\[Warning\] \S*/train/.* cannot be read", text)) == 5
    assert len(re.findall(r"\[Warning\] \S*/val/.* cannot be read", text)) == 5
    assert "5 validation images could not be read; they count as wrong" in text
    for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_two_ranks_share_one_budget_and_one_list(tmp_path):
    """Each bad image is named once though both ranks meet some; together they are over the budget, alone neither."""
    data = tmp_path / "set"
    chaos.make_images(data, 40, 10)
    for name in ("0000.jpg", "0010.jpg", "0020.jpg", "0030.jpg"):
        (data / "train" / "class0" / name).write_bytes(b"")
    (data / "val" / "class0" / "0000.jpg").write_bytes(b"")
    words = chaos.command("MnasNet", data, tmp_path / "out", "--device-list", "0,1")
    job = chaos.Job([*words, "--max-bad-images", "0.1"], tmp_path / "log")
    assert job.end(100) == 0, job.text()
    assert len(re.findall(r"\[Warning\] \S+/train/\S+ cannot be read: UnidentifiedImageError", job.text())) == 4
    assert len(re.findall(r"\[Warning\] \S+/val/\S+ cannot be read", job.text())) == 1
    assert job.text().count("1 validation images could not be read; they count as wrong") == 2  # epochs
    job = chaos.Job([*words, "--max-bad-images", "0.08"], tmp_path / "log")
    assert job.end(100) == 1, job.text()
    line = r"^\[Error.*4 images of .* cannot be read, more than --max-bad-images 3.2"
    assert len(re.findall(line, job.text(), re.M)) == 1
