"""torchvision sorts ImageNet's official archives into the folders that our loader reads, as the README says."""

import hashlib
import io
import tarfile

import numpy as np
import scipy.io

from common.data import ImageFolder
from common.transforms import import_torchvision
from tests.helpers import ROOT, encoded, pattern

TRAIN = {"n01751748": 2, "n02105855": 1, "n09193705": 3}  # images in the archive of each class
VAL = ["n09193705", "n01751748", "n01751748", "n02105855", "n09193705"]  # class of each numbered image
NUMBERED = ["n02105855", "n09193705", "n01751748"]  # the devkit has an order of its own


def add(archive, name, data):
    """Add a file to a tar archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def tar(files, mode="w"):
    """Return the bytes of a tar archive of {name: bytes}."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, data in files.items():
            add(archive, name, data)
    return content.getvalue()


def devkit():
    """Return the bytes of the development kit: the classes, one of them not a leaf, and the class of each val image."""
    fields = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    rows = [(number + 1, name, name + " words", "gloss", 0) for number, name in enumerate(NUMBERED)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([*rows, (4, "n00000001", "above", "gloss", 3)], dtype=fields)})
    truth = "".join("{}\n".format(NUMBERED.index(name) + 1) for name in VAL)
    folder = "ILSVRC2012_devkit_t12/data/"
    files = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}
    return tar({folder + name: data for name, data in files.items()}, "w:gz")


def test_the_official_archives_become_a_data_set(tmp_path, monkeypatch):
    import_torchvision()
    from torchvision.datasets import ImageNet, imagenet

    image = encoded(pattern())
    classes = {name + ".tar": tar({"{}_{}.JPEG".format(name, i): image for i in range(TRAIN[name])}) for name in TRAIN}
    archives = {
        "train": ("ILSVRC2012_img_train.tar", tar(classes)),
        "val": (
            "ILSVRC2012_img_val.tar",
            tar({"ILSVRC2012_val_{:08d}.JPEG".format(i + 1): image for i in range(len(VAL))}),
        ),
        "devkit": ("ILSVRC2012_devkit_t12.tar.gz", devkit()),
    }
    for split, (name, data) in archives.items():
        assert imagenet.ARCHIVE_META[split][0] == name
        (tmp_path / name).write_bytes(data)
        monkeypatch.setitem(imagenet.ARCHIVE_META, split, (name, hashlib.md5(data).hexdigest()))
    assert """I("/data/imagenet", "train"); I("/data/imagenet", "val")""" in (ROOT / "README.md").read_text()
    for split in ("train", "val"):
        ImageNet(str(tmp_path), split)
    train, val = (ImageFolder(str(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == sorted(TRAIN) and train.notices == val.notices == []
    assert np.bincount(train.targets).tolist() == [TRAIN[name] for name in sorted(TRAIN)]
    found = {val.name(index): val.classes[target] for index, target in enumerate(val.targets)}
    assert found == {"{}/ILSVRC2012_val_{:08d}.JPEG".format(name, i + 1): name for i, name in enumerate(VAL)}
    assert val.read(0) == image
