"""Packed data sets, and what a worker holds in memory."""

import collections
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

from common import data, pack
from common.data import ImageFolder
from common.errors import UserError
from common.transforms import CenterCrop
from tests import helpers
from tests.helpers import ROOT, encoded, loader, photograph, seen, write_set


def packed(source, target, *options):
    assert pack.main([str(source), str(target), "--workers", "2", *options]) == 0
    return target


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_no_image_is_lost_where_the_progress_bar_is_switched_off(kind, few_digits, tmp_path, monkeypatch):
    """tqdm reads the variable when it is imported, and a bar without a display does not count."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    command = [sys.executable, "-m", "common.pack", str(few_digits), str(tmp_path / "packed"), "--format", kind]
    subprocess.run(command, cwd=str(ROOT), check=True, timeout=helpers.LIMIT)
    whole = packed(few_digits, tmp_path / "whole", "--format", kind)
    places = [pack.Pack(str(folder / "train"))._places for folder in (tmp_path / "packed", whole)]
    assert np.array_equal(places[0][:, 1:], places[1][:, 1:]) and (places[0][:, 1] > 0).all()


def pixels(images, index):
    return images.image(index).pixels()


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_the_pixels_are_kept_with_size_0_and_where_images_are_small(kind, few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed", "--size", "0", "--format", kind)
    assert sorted(os.listdir(str(target))) == ["train.index.npz", "train.pack", "val.index.npz", "val.pack"]
    small = packed(few_digits, tmp_path / "small", "--format", kind)
    for split in ("train", "val"):
        theirs = ImageFolder(str(few_digits), split)
        for ours in (ImageFolder(str(target), split), ImageFolder(str(small), split)):
            assert ours.classes == theirs.classes and np.array_equal(ours.targets, theirs.targets)
            for index in range(len(theirs)):
                assert np.array_equal(pixels(ours, index), pixels(theirs, index))
                assert ours.name(index) == theirs.name(index)


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_training_takes_the_same_crops_from_a_pack(kind, few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed", "--size", "0", "--format", kind)
    for training in (True, False):
        items = [loader(folder, training, workers=2) for folder in (few_digits, target)]
        assert items[0].order_facts == items[1].order_facts  # so that a run can go on with the other
        for one, other in zip(*[seen(item, epoch=1) for item in items]):
            assert torch.equal(one, other)


@pytest.fixture
def photographs(tmp_path):
    """Two classes of JPEG files of 500x375 pixels, one of 200x150, and one that is no image."""
    folder, large = tmp_path / "photographs", [encoded(photograph(500, 375, number), quality=92) for number in range(2)]
    for name in ("bird", "cat"):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(2):
            (folder / "train" / name / "{}.jpg".format(number)).write_bytes(large[number])
    (folder / "train" / "bird" / "small.jpg").write_bytes(encoded(photograph(200, 150)))
    (folder / "train" / "cat" / "broken.jpg").write_bytes(large[0][:3000])
    return folder


def centre_crop(image, interpolation):
    out = torch.empty(224, 224, 3, dtype=torch.uint8)
    CenterCrop(224, 256, interpolation)(image, out)
    return out


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind, most", [("raw", 0), ("jpeg", 7)])
def test_larger_images_are_made_as_small_as_for_val(kind, most, interpolation, photographs, tmp_path, capsys):
    """So that raw pixels give the accuracy of the files; JPEG changes them."""
    options = ["--size", "256", "--format", kind, "--interpolation", interpolation]
    target = packed(photographs, tmp_path / "packed", *options)
    assert "cat/broken.jpg: OSError: image file is truncated" in capsys.readouterr().out
    ours, theirs = ImageFolder(str(target), "train"), ImageFolder(str(photographs), "train")
    for index in range(len(ours)):
        if theirs.name(index) == "cat/broken.jpg":
            continue
        image, original = ours.image(index), theirs.image(index)
        if theirs.name(index) == "bird/small.jpg":
            assert np.array_equal(image.pixels(), original.pixels())
            continue
        assert (image.height, image.width) == (256, 341)
        difference = (centre_crop(image, interpolation).float() - centre_crop(original, interpolation)).abs()
        assert difference.mean() <= most  # noise, the hardest for JPEG


def test_another_order_is_not_said_but_other_pixels_are(photographs, tmp_path):
    """A run that goes on with a pack is refused within an epoch; between epochs a line says the difference."""
    facts = []
    for number, options in enumerate([[], ["--format", "jpeg"], ["--size", "300"], ["--size", "0"]]):
        target = packed(photographs, tmp_path / str(number), *options)
        facts.append(loader(target, True, max_bad_images=0.5).order_facts)
    facts.append(loader(photographs, True, max_bad_images=0.5).order_facts)
    names = [item.pop("pixels") for item in facts]
    assert all(item == facts[0] for item in facts)
    assert names == [
        "shorter side 256 at most, bilinear, raw",
        "shorter side 256 at most, bilinear, jpeg",
        "shorter side 300 at most, bilinear, raw",
        "of the files",
        "of the files",
    ]


def test_a_run_goes_on_with_a_pack_of_the_same_pixels(mnasnet, tmp_path):
    """Bitwise, with a line; within an epoch other pixels are refused."""
    folder = helpers.make_images(tmp_path / "set")
    same, smaller = packed(folder, tmp_path / "same"), packed(folder, tmp_path / "smaller", "--size", "32")

    def run(images, out, *more):
        words = helpers.flags("MnasNet", images, tmp_path / out, "--resume", "auto", *more)
        return mnasnet.run(words, tmp_path / "log")

    status, whole = run(folder, "whole")
    assert status == 0, whole
    status, text = run(folder, "parts", "--max-steps", "3")
    assert status == 0, text
    status, text = run(smaller, "parts")
    assert status == 1 and "(pixels of the files -> shorter side 32 at most, bilinear, raw)" in text
    status, text = run(same, "parts")
    assert status == 0 and "data {} -> {}".format(folder, same) in text, text
    helpers.assert_equal(helpers.weights(tmp_path / "parts"), helpers.weights(tmp_path / "whole"))
    found = [re.findall(r"^ \* Acc@1 .*", output, re.M) for output in (whole, text)]
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_bad_images_are_counted_as_without_a_pack(kind, photographs, tmp_path):
    target = packed(photographs, tmp_path / "packed", "--format", kind)
    found = []
    for folder in (photographs, target):
        item = loader(folder, True, batch_size=2, max_bad_images=0.5)
        seen(item)
        found.append((item.bad, [os.path.relpath(line, str(folder)) for line in item.share_bad()]))
    assert found[0] == found[1] and len(found[0][0]) == 1


def test_what_is_there_is_not_overwritten(few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed")
    with pytest.raises(UserError, match="exists already"):
        pack.main([str(few_digits), str(target)])
    for source in (few_digits / "train", target):  # a pack is made from the files
        with pytest.raises(UserError, match="neither a train/ nor a val/"):
            pack.main([str(source), str(tmp_path / "other")])


@pytest.mark.parametrize("name", ["", "/", "//", "."])
def test_a_name_that_no_folder_can_have_is_refused_before_the_work(name, few_digits, tmp_path, monkeypatch):
    """An unset variable: what an interrupted run left would be looked for in the folder where the user stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".part").mkdir()
    with pytest.raises(UserError, match=r"^/.* exists already: give the name of a new folder"):
        pack.main([str(few_digits), name])
    assert (tmp_path / ".part").is_dir()


def refusal(folder, split="train"):
    with pytest.raises(UserError) as caught:
        ImageFolder(str(folder), split, classes=[str(number) for number in range(10)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pack_that_is_cut_foreign_or_old_is_one_line(few_digits, tmp_path):
    one, other = packed(few_digits, tmp_path / "one"), packed(few_digits, tmp_path / "other", "--format", "jpeg")
    for number, (name, content, line) in enumerate(
        [
            ("train.pack", (one / "train.pack").read_bytes()[:1000], "has 1000 bytes, its index says"),
            ("train.pack", b"", "is no pack, or of an earlier version: pack the data set again"),
            ("train.pack", (one / "val.pack").read_bytes(), "damaged, or not that of"),
            ("train.pack", (other / "train.pack").read_bytes(), "damaged, or not that of"),
            ("train.pack", b"\xff\xd8\xff\xe0" * 100000, "is no pack, or of an earlier version"),
            ("train.index.npz", b"PK", "damaged, or not that of"),
            ("train.index.npz", (other / "train.index.npz").read_bytes(), "damaged, or not that of"),
            ("train.index.npz", None, "train.index.npz: No such file or directory: copy the pack again"),
        ]
    ):
        place = tmp_path / str(number)
        shutil.copytree(str(one), str(place))
        os.remove(str(place / name))
        if content is not None:
            (place / name).write_bytes(content)
        assert line in refusal(place)


def test_damaged_packs_are_one_line_or_have_the_right_pixels(tmp_path):
    """Truncations and flipped bytes anywhere in the pixels and in the index."""
    names = ["{}/{}.png".format(name, number) for name in "ab" for number in range(6)]
    source = write_set(tmp_path, {name: encoded(photograph(20, 16, i), "PNG") for i, name in enumerate(names)}, ["val"])
    target = packed(source, tmp_path / "packed")
    expected = [pixels(ImageFolder(str(target), "val"), index) for index in range(12)]
    draw, counts = random.Random(3), collections.Counter()
    for _ in range(1000):
        path = target / draw.choice(["val.pack", "val.index.npz"])
        content = path.read_bytes()
        damaged = bytearray(content)
        if draw.random() < 0.3:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            images = ImageFolder(str(target), "val")
            for index in range(12):
                try:
                    assert np.array_equal(pixels(images, index), expected[index])
                    counts["right"] += 1
                except OSError as error:
                    assert str(error) == "the pack is damaged here: copy it again"
                    counts["damaged image"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
        path.write_bytes(content)
    assert min(counts["refused"], counts["damaged image"]) > 200 and counts["right"] > 2000, counts


def test_a_damaged_image_of_a_pack_is_named_and_replaced(few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed")
    with open(str(target / "train.pack"), "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    item = loader(target, True, workers=2, max_bad_images=0.02)
    seen(item)
    (line,) = item.share_bad()
    assert line.startswith(str(target / "train"))
    assert line.endswith(" cannot be read: OSError: the pack is damaged here: copy it again")


@pytest.mark.parametrize(
    "words", [["--size", "-1"], ["--quality", "0"], ["--workers", "0"], ["--size", "big"], ["--format", "png"]]
)
def test_options_out_of_range_are_refused(words, few_digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        pack.main([str(few_digits), str(tmp_path / "packed"), *words])
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_are_said_first_and_refused_where_they_are_not_free(few_digits, tmp_path, capsys, monkeypatch):
    target = packed(few_digits, tmp_path / "packed")
    said = re.search(r"packed needs about ([\d,]+) bytes, [\d,]+ are free\n", capsys.readouterr().out).group(1)
    written = sum(os.path.getsize(str(target / name)) for name in ("train.pack", "val.pack"))
    assert int(said.replace(",", "")) == written - 2 * len(pack.HEAD % 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(
        UserError, match="other cannot be written: No space left on device: --format jpeg takes about a sixth"
    ):
        pack.main([str(few_digits), str(tmp_path / "other")])
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_a_disk_that_gets_full_is_one_line(few_digits, tmp_path, monkeypatch):
    """A write of a worker that the disk takes in part."""
    monkeypatch.setattr(os, "pwrite", lambda file, content, start: len(content) // 2)
    with pytest.raises(UserError, match="packed cannot be written: No space left on device"):
        pack.main([str(few_digits), str(tmp_path / "packed")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_packing_leaves_no_data_set_and_no_process(signum, few_digits, tmp_path):
    target = tmp_path / "packed"
    command = [sys.executable, "-m", "common.pack", str(few_digits), str(target), "--workers", "2"]
    hung = "import os, runpy, sys, time; os.pwrite = lambda *_: time.sleep(100); sys.argv = {!r}; "
    hung = (hung + "runpy.run_module('common.pack', run_name='__main__')").format(command[1:2] + command[3:])
    process = subprocess.Popen(
        [sys.executable, "-c", hung], cwd=str(ROOT), stderr=subprocess.PIPE, start_new_session=True
    )
    while not (tmp_path / "packed.part" / "train.pack").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signum)
    assert (
        process.wait(helpers.LIMIT) == -signum and b"Traceback" not in process.stderr.read()
    )  # which ends with the last process
    assert not target.exists() and (tmp_path / "packed.part").exists()
    subprocess.run(command, cwd=str(ROOT), check=True, timeout=helpers.LIMIT)
    assert target.exists() and not (tmp_path / "packed.part").exists()


def megabytes(*processes):
    """Return the memory in MB that `processes` have together, what they share counted once; files are not theirs."""
    total = 0
    for process in processes:
        with open("/proc/{}/smaps_rollup".format(process)) as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss_Anon:"))
    return total / 1024


def print_growth(folder):
    """Print the MB that a process with a loader of 1.28 million images, and its worker, take in 100 epochs."""
    images, repeats = ImageFolder(folder, "train"), 1281167 // 80
    images.names, images.targets = np.tile(images.names, repeats), np.tile(images.targets, repeats)
    item = loader(folder, True, images=images, workers=1, batch_size=80)
    draws = np.random.RandomState(0)  # all over the set
    data.epoch_order = lambda *_: draws.randint(0, len(images), 80)
    item._batches_from = lambda start: 1
    for epoch in range(120):
        seen(item)
        if epoch == 20:
            (worker,) = (int(path.split("/")[2]) for path in children(os.getpid()))
            after_20 = megabytes(os.getpid(), worker)
    print(megabytes(os.getpid(), worker) - after_20)


def test_a_worker_does_not_grow_with_the_data_set(few_digits):
    """In a process of its own: where tests have left a large heap, each page that it writes to counts twice."""
    code = "from tests.unit.test_pack import print_growth; print_growth({!r})".format(str(few_digits))
    printed = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), stdout=subprocess.PIPE, check=True).stdout
    assert float(printed) < 12  # a list of str would have 8000 pages copied, 32 MB


def test_a_worker_that_reads_a_pack_has_no_map_of_it(few_digits, tmp_path):
    """Page tables for all of ImageNet's pixels are 0.7 GB for each process."""
    item = loader(packed(few_digits, tmp_path / "packed"), True, workers=1)
    seen(item)
    with open(children(os.getpid())[-1] + "maps") as file:
        assert ".pack" not in file.read()


def children(process):
    """Return the folders in /proc of the children of `process` that decode."""
    with open("/proc/{0}/task/{0}/children".format(process)) as file:
        return ["/proc/{}/".format(child) for child in file.read().split()][-1:]
