"""Packed data sets, the cached scan, and what a worker holds in memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import input, pack, scan
from common.decode import CenterCrop, EncodedImage
from common.errors import UserError
from common.folder import ImageFolder
from tests.bundles import ROOT
from tests.test_bad_images import loader as careful_loader
from tests.test_input import collected, jpeg, loader, photograph


def packed(source, target, *options):
    assert pack.main([str(source), str(target), "--workers", "2", *options]) == 0
    return target


def test_the_bytes_are_kept_with_size_0(few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed", "--size", "0")
    assert sorted(os.listdir(str(target))) == ["train.index.npz", "train.pack", "val.index.npz", "val.pack"]
    for split in ("train", "val"):
        ours, theirs = ImageFolder(str(target), split), ImageFolder(str(few_digits), split)
        assert ours.classes == theirs.classes and np.array_equal(ours.targets, theirs.targets)
        for index in range(len(theirs)):
            assert ours.read(index) == theirs.read(index) and ours.name(index) == theirs.name(index)


def test_training_takes_the_same_crops_from_a_pack(few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed", "--size", "0")
    for training in (True, False):
        batches = [collected(loader(folder, training, workers=2).batches(epoch=1)) for folder in (few_digits, target)]
        for (images, targets), (packed_images, packed_targets) in zip(*batches):
            assert torch.equal(images, packed_images) and torch.equal(targets, packed_targets)


@pytest.fixture
def photographs(tmp_path):
    """Two classes of JPEG files of 500x375 pixels, one of 200x150, and one that is no image."""
    folder = tmp_path / "photographs"
    for name in ("bird", "cat"):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(2):
            (folder / "train" / name / "{}.jpg".format(number)).write_bytes(jpeg(photograph(500, 375, number)))
    (folder / "train" / "bird" / "small.jpg").write_bytes(jpeg(photograph(200, 150)))
    (folder / "train" / "cat" / "broken.jpg").write_bytes(jpeg(photograph(500, 375))[:3000])
    return folder


def test_larger_images_are_made_smaller(photographs, tmp_path, capsys):
    target = packed(photographs, tmp_path / "packed", "--size", "256")
    assert "cat/broken.jpg" in capsys.readouterr().out
    ours, theirs = ImageFolder(str(target), "train"), ImageFolder(str(photographs), "train")
    for index in range(len(ours)):
        if theirs.name(index) in ("bird/small.jpg", "cat/broken.jpg"):
            assert ours.read(index) == theirs.read(index)
            continue
        image = EncodedImage(ours.read(index))
        assert (image.height, image.width) == (256, 341)
        crops = []
        for data in (ours.read(index), theirs.read(index)):
            out = torch.empty(224, 224, 3, dtype=torch.uint8)
            CenterCrop(224, 256)(EncodedImage(data), out)
            crops.append(out.float())
        assert (crops[0] - crops[1]).abs().mean() < 7  # noise, the hardest for JPEG


def test_bad_images_are_counted_as_without_a_pack(photographs, tmp_path):
    target = packed(photographs, tmp_path / "packed", "--size", "256")
    found = []
    for folder in (photographs, target):
        item = careful_loader(ImageFolder(str(folder), "train"), training=True, share=0.5)
        for _ in item.batches():
            pass
        found.append((item.bad, [(os.path.basename(path), reason) for path, reason in item.unnamed]))
    assert found[0] == found[1] and len(found[0][0]) == 1


def test_what_is_there_is_not_overwritten_and_damage_is_named(few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed", "--size", "0")
    with pytest.raises(UserError, match="exists already"):
        pack.main([str(few_digits), str(target)])
    with pytest.raises(UserError, match="neither a train/ nor a val/"):
        pack.main([str(target), str(tmp_path / "other")])
    os.truncate(str(target / "train.pack"), 1000)
    with pytest.raises(UserError, match="has 1000 bytes, its index says"):
        ImageFolder(str(target), "train")
    (target / "val.index.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="pack the data set again"):
        ImageFolder(str(target), "val", classes=["0"])


def test_an_interrupted_packing_leaves_no_data_set(few_digits, tmp_path):
    target = tmp_path / "packed"
    code = "from common import files, pack; files.sync = exit; pack.main({!r})"
    arguments = [str(few_digits), str(target), "--workers", "1"]
    subprocess.run([sys.executable, "-c", code.format(arguments)], cwd=str(ROOT), check=False, timeout=100)
    assert not target.exists() and (tmp_path / "packed.part").exists()
    packed(few_digits, target)
    assert target.exists() and not (tmp_path / "packed.part").exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that takes folders of any size and age."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "CACHED_FROM", 1)
    monkeypatch.setattr(scan, "_MARGIN", -(10**12))
    return tmp_path / "cache" / "imagenet-bundles"


def names(folder):
    images = ImageFolder(str(folder), "train")
    return [images.name(index) for index in range(len(images))]


def test_the_second_scan_comes_from_the_cache(photographs, cache, monkeypatch):
    first = names(photographs)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(scan, "_scan", None)  # a call would fail
        assert names(photographs) == first
    (photographs / "train" / "cat" / "0.jpg").rename(photographs / "train" / "cat" / "9.jpg")
    assert names(photographs) == sorted(name.replace("cat/0", "cat/9") for name in first)
    (photographs / "train" / "ant" / "deep").mkdir(parents=True)
    (photographs / "train" / "ant" / "deep" / "1.png").write_bytes(b"")
    assert "ant/deep/1.png" in names(photographs)
    (photographs / "train" / "ant" / "deep" / "2.png").write_bytes(b"")
    assert "ant/deep/2.png" in names(photographs)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_a_damaged_cache_is_made_anew(photographs, cache, content):
    first = names(photographs)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert names(photographs) == first and file.read_bytes() != content


def test_a_folder_that_may_still_change_is_not_cached(photographs, cache, monkeypatch):
    monkeypatch.setattr(scan, "_MARGIN", 2 * 10**9)
    names(photographs)
    assert not cache.exists() or not list(cache.iterdir())


def megabytes(*processes):
    """Return the memory in MB that `processes` have together, what they share counted once."""
    total = 0
    for process in processes:
        with open("/proc/{}/smaps_rollup".format(process)) as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


def test_a_worker_does_not_grow_with_the_data_set(few_digits, monkeypatch):
    item = loader(few_digits, True, workers=1, batch_size=80)
    images, repeats = item.images, 1281167 // 80
    images._names, images._ends = scan.join([images.name(i) for i in range(80)] * repeats)
    images.targets = np.tile(images.targets, repeats)
    draws = np.random.RandomState(0)  # all over the set
    monkeypatch.setattr(input, "epoch_order", lambda *_: draws.randint(0, len(images.targets), 80))
    monkeypatch.setattr(item, "steps_from", lambda start: 1)
    for epoch in range(120):
        for _ in item.batches():
            pass
        if epoch == 20:
            (worker,) = (process.pid for process in item._batches._iterator._workers)
            after_20 = megabytes(os.getpid(), worker)
    assert megabytes(os.getpid(), worker) - after_20 < 12  # a list of str would have 8000 pages copied, 32 MB
