"""Images that cannot be read: replaced within a budget in training, counted as wrong in val/, and named."""

import json
import os
import random
import re
import socket

import pytest
import torch

from common.data import UNREADABLE, ImageFolder
from common.errors import UserError
from tests import helpers
from tests.helpers import loader, mutated, odd_images, pil_pixels, seen, write_set


@pytest.fixture
def odd_set(tmp_path, monkeypatch):
    """A set with every odd image, and what is no file: a folder, links into nowhere and into a loop, a pipe, ..."""
    files = dict(odd_images())
    files.update(("mutated{:04d}.jpg".format(i), mutated(random.Random(i), files["plain.jpg"])) for i in range(200))
    root = tmp_path / "set"
    write_set(root, files)
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
        try:
            assert os.path.isfile(path)
            with open(path, "rb") as file:
                pil_pixels(file.read())
        except Exception:
            bad.add(index)
    return bad


def test_evaluation_counts_what_it_cannot_read(odd_set):
    """Each file is accounted for, and nothing stands in for another; the next evaluation counts anew."""
    images = ImageFolder(str(odd_set), "val")
    assert not any(images.path(index).endswith("folder.jpg") for index in range(len(images)))
    expected = expected_bad(images)
    assert len(expected) > 12
    item = loader(odd_set, False, workers=2, batch_size=4)
    named = []
    for _ in range(2):
        _, targets = seen(item)
        named += item.share_bad()
        assert set(item.bad) == expected
        assert (targets == UNREADABLE).sum().item() == len(expected)
        assert (targets >= 0).sum().item() == len(images) - len(expected)
    names = [line.partition(" cannot be read: ")[0] for line in named]
    assert sorted(names) == sorted(images.path(index) for index in expected)  # once each
    assert not any("object at 0x" in line for line in named)
    os.remove(images.path(min(expected)))
    with open(images.path(min(expected)), "wb") as file:
        file.write(odd_images()["plain.jpg"])
    seen(item)
    item.share_bad()
    assert set(item.bad) == expected - {min(expected)}


def test_training_replaces_deterministically(odd_set):
    images, results = ImageFolder(str(odd_set), "train"), []
    for workers in (0, 2):
        item = loader(odd_set, True, workers=workers, batch_size=4, max_bad_images=1.0)
        pixels, targets = seen(item, epoch=1)
        assert len(item.new_bad) > 12 and not item.bad  # until the ranks have told each other
        names = [line.partition(" cannot be read: ")[0] for line in item.share_bad()]
        results.append((pixels, set(item.bad), names))
        assert (targets >= 0).all() and not item.new_bad
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    # A crop is decoded from the rows it needs: damage below them is not met.
    missed = expected_bad(images) - results[0][1]
    assert results[0][1] <= expected_bad(images) and len(missed) < 30
    assert all("mutated" in images.path(index) for index in missed)
    assert sorted(results[0][2]) == sorted(results[1][2]) and len(set(results[0][2])) == len(results[0][2])


def numbered(folder, count, is_bad):
    """Write `count` images of which those for whose number `is_bad` is true are empty."""
    plain = odd_images()["plain.jpg"]
    return write_set(folder, {"{:05d}.jpg".format(i): b"" if is_bad(i) else plain for i in range(count)}, ["train"])


def epoch_of(folder, share, **options):
    """Take an epoch and return how many images were bad."""
    item = loader(folder, True, batch_size=4, max_bad_images=share, **options)
    seen(item)
    item.share_bad()
    return len(item.bad)


def test_the_budget(tmp_path):
    """As many as it allows are replaced; one more ends the run with the list."""
    folder = numbered(tmp_path, 60, lambda i: i % 10 == 0)
    assert epoch_of(folder, 0.1) == 6
    with pytest.raises(UserError) as caught:
        epoch_of(folder, 0.09)
    text = "6 of 60 images of {0}/train cannot be read; --max-bad-images allows 5: {0}/train/class/00000.jpg ("
    assert str(caught.value).startswith(text.format(tmp_path))
    assert str(caught.value).count(".jpg (UnidentifiedImageError: cannot identify image file)") == 6


def test_one_image_may_be_bad_in_a_small_set(tmp_path):
    """A thousandth of 121 images is none; --max-bad-images 0 means none."""
    one, two = numbered(tmp_path / "one", 121, lambda i: i == 7), numbered(tmp_path / "two", 121, lambda i: i < 2)
    assert epoch_of(one, 0.001) == 1
    with pytest.raises(UserError, match=r"1 of 121 images .* cannot be read; --max-bad-images allows 0: "):
        epoch_of(one, 0.0)
    assert epoch_of(one, 0.009) == 1
    with pytest.raises(UserError, match=r"2 of 121 images .* cannot be read; --max-bad-images allows 1: "):
        epoch_of(two, 0.001)
    assert epoch_of(two, 0.017) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_a_single_image_ends_at_once(workers, tmp_path):
    """With every share, also of all images: no batch of it is handed on."""
    folder = numbered(tmp_path, 300, lambda i: True)
    reads = []
    for share, tried in ((0.0, 1), (0.02, 7), (1.0, 300)):
        images = ImageFolder(folder, "train")
        images.read = lambda index, read=images.read: reads.append(index) or read(index)
        batches = loader(folder, True, images=images, batch_size=4, max_bad_images=share, workers=workers).batches()
        with pytest.raises(UserError) as caught:
            next(batches)
        assert str(caught.value).startswith("{} of 300 images of {}/train cannot be read".format(tried, tmp_path))
        assert workers or len(reads) == tried
        reads.clear()
    assert "; --max-bad-images allows 299: " in str(caught.value)  # there is no other to train on


def test_names_cannot_write_into_the_log(mnasnet, tmp_path):
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
    words = helpers.flags("MnasNet", tmp_path / "set", tmp_path, "--epochs", "1", "--max-bad-images", "0.3")
    words += ["--log-dir", tmp_path / "log"]
    status, text = mnasnet.run(words, tmp_path / "screen")
    assert status == 0, text
    status, again = mnasnet.run([*words, "--resume", "auto"], tmp_path / "screen")
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
    helpers.make_images(data, 40, 10)
    for name in ("0000.jpg", "0010.jpg", "0020.jpg", "0030.jpg"):
        (data / "train" / "class0" / name).write_bytes(b"")
    (data / "val" / "class0" / "0000.jpg").write_bytes(b"")
    words = [*helpers.flags("MnasNet", data, tmp_path / "out", "--device-list", "0,1"), "--max-bad-images"]
    process = helpers.main_py("MnasNet", *words, "0.1")
    text = process.stdout + process.stderr
    assert process.returncode == 0, text
    assert len(re.findall(r"\[Warning\] \S+/train/\S+ cannot be read: UnidentifiedImageError", text)) == 4
    assert len(re.findall(r"\[Warning\] \S+/val/\S+ cannot be read", text)) == 1
    assert text.count("1 validation images could not be read; they count as wrong") == 2  # epochs
    process = helpers.main_py("MnasNet", *words, "0.08")
    text = process.stdout + process.stderr
    assert process.returncode == 1, text
    line = r"^\[Error.*4 of 40 images of .* cannot be read; --max-bad-images allows 3: "
    assert len(re.findall(line, text, re.M)) == 1
