"""Packed data sets, and what a worker holds in memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import data, pack
from common.data import ImageFolder
from common.errors import UserError
from common.transforms import CenterCrop, EncodedImage
from tests.bundles import ROOT
from tests.images import encoded, loader, photograph, seen


def packed(source, target, *options):
    assert pack.main([str(source), str(target), "--workers", "2", *options]) == 0
    return target


def test_the_bytes_are_kept_with_size_0(few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed", "--size", "0")
    assert sorted(os.listdir(str(target))) == ["train.index.npz", "train.pack", "val.index.npz", "val.pack"]
    again = packed(target, tmp_path / "again", "--size", "0")
    for split in ("train", "val"):
        theirs = ImageFolder(str(few_digits), split)
        for ours in (ImageFolder(str(target), split), ImageFolder(str(again), split)):
            assert ours.classes == theirs.classes and np.array_equal(ours.targets, theirs.targets)
            for index in range(len(theirs)):
                assert ours.read(index) == theirs.read(index) and ours.name(index) == theirs.name(index)


def test_training_takes_the_same_crops_from_a_pack(few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed", "--size", "0")
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


def test_larger_images_are_made_smaller(photographs, tmp_path, capsys):
    target = packed(photographs, tmp_path / "packed", "--size", "256")
    assert "cat/broken.jpg: OSError: image file is truncated" in capsys.readouterr().out
    ours, theirs = ImageFolder(str(target), "train"), ImageFolder(str(photographs), "train")
    for index in range(len(ours)):
        if theirs.name(index) in ("bird/small.jpg", "cat/broken.jpg"):
            assert ours.read(index) == theirs.read(index)
            continue
        image = EncodedImage(ours.read(index))
        assert (image.height, image.width) == (256, 341)
        crops = []
        for content in (ours.read(index), theirs.read(index)):
            out = torch.empty(224, 224, 3, dtype=torch.uint8)
            CenterCrop(224, 256)(EncodedImage(content), out)
            crops.append(out.float())
        assert (crops[0] - crops[1]).abs().mean() < 7  # noise, the hardest for JPEG


def test_bad_images_are_counted_as_without_a_pack(photographs, tmp_path):
    target = packed(photographs, tmp_path / "packed", "--size", "256")
    found = []
    for folder in (photographs, target):
        item = loader(folder, True, batch_size=2, max_bad_images=0.5)
        seen(item)
        item.share_bad()
        found.append((item.bad, [(os.path.basename(path), reason) for path, reason in item.unnamed]))
    assert found[0] == found[1] and len(found[0][0]) == 1


def test_what_is_there_is_not_overwritten_and_damage_is_named(few_digits, tmp_path):
    target = packed(few_digits, tmp_path / "packed", "--size", "0")
    with pytest.raises(UserError, match="exists already"):
        pack.main([str(few_digits), str(target)])
    with pytest.raises(UserError, match="neither a train/ nor a val/"):
        pack.main([str(few_digits / "train"), str(tmp_path / "other")])
    os.truncate(str(target / "train.pack"), 1000)
    with pytest.raises(UserError, match="has 1000 bytes, its index says"):
        ImageFolder(str(target), "train")
    (target / "val.index.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="pack the data set again"):
        ImageFolder(str(target), "val", classes=["0"])


@pytest.mark.parametrize("words", [["--size", "-1"], ["--quality", "0"], ["--workers", "0"], ["--size", "big"]])
def test_options_out_of_range_are_refused(words, few_digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        pack.main([str(few_digits), str(tmp_path / "packed"), *words])
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_packing_leaves_no_data_set(few_digits, tmp_path):
    target = tmp_path / "packed"
    code = "import os\nfrom common import pack\nos.fsync = lambda _: os._exit(1)\npack.main({!r})"
    arguments = [str(few_digits), str(target), "--workers", "1"]
    subprocess.run([sys.executable, "-c", code.format(arguments)], cwd=str(ROOT), check=False, timeout=100)
    assert not target.exists() and (tmp_path / "packed.part").exists()
    packed(few_digits, target)
    assert target.exists() and not (tmp_path / "packed.part").exists()


def megabytes(*processes):
    """Return the memory in MB that `processes` have together, what they share counted once; files are not theirs."""
    total = 0
    for process in processes:
        with open("/proc/{}/smaps_rollup".format(process)) as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss_Anon:"))
    return total / 1024


def test_a_worker_does_not_grow_with_the_data_set(few_digits, monkeypatch):
    images, repeats = ImageFolder(str(few_digits), "train"), 1281167 // 80
    images.names, images.targets = np.tile(images.names, repeats), np.tile(images.targets, repeats)
    item = loader(few_digits, True, images=images, workers=1, batch_size=80)
    draws = np.random.RandomState(0)  # all over the set
    monkeypatch.setattr(data, "epoch_order", lambda *_: draws.randint(0, len(images), 80))
    monkeypatch.setattr(item, "steps_from", lambda start: 1)
    for epoch in range(120):
        seen(item)
        if epoch == 20:
            (worker,) = (int(path.split("/")[2]) for path in children(os.getpid()))
            after_20 = megabytes(os.getpid(), worker)
    assert megabytes(os.getpid(), worker) - after_20 < 12  # a list of str would have 8000 pages copied, 32 MB


def children(process):
    """Return the folders in /proc of the children of `process` that decode."""
    with open("/proc/{0}/task/{0}/children".format(process)) as file:
        return ["/proc/{}/".format(child) for child in file.read().split()][-1:]
