"""`python -m common.prepare_imagenet` sorts the flat validation folder into class folders, or moves nothing."""

import os
import shutil
import struct
import sys
import tarfile
import zlib

import pytest

from common import prepare_imagenet
from common.errors import UserError
from common.folder import ImageFolder
from tests.bundles import ROOT
from tests.conftest import run

NAMES = ["ILSVRC2012_val_{:08d}.JPEG".format(number) for number in (1, 2, 3, 4)]
CLASSES = ["n01751748", "n09193705", "n02105855", "n01751748"]
DONE = sorted("{}/{}".format(label, name) for label, name in zip(CLASSES, NAMES))


@pytest.fixture
def val(tmp_path):
    """A flat folder of four images, and a file that is none."""
    folder = tmp_path / "val"
    folder.mkdir()
    for name in [*NAMES, "readme.txt"]:
        (folder / name).write_text(name)
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.JPEG"))


def _meta_mat(names, compressed):
    """Return a file in MATLAB's form whose synsets have these names: a header, and an element of text of two bytes."""
    content = b"".join(b"gloss\0\0\0" + name.encode("utf-16-le") for name in names)
    data = zlib.compress(content) if compressed else content
    return b"MATLAB 5.0 MAT-file".ljust(128) + struct.pack("<ii", 15 if compressed else 14, len(data)) + data


def _write_labels(folder, form):
    """Write the classes of the four images in one of the forms; return the argument that names them."""
    path = folder / form
    if form.startswith("devkit"):
        (path / "data").mkdir(parents=True)
        (path / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n3\n")
        names = ["n09193705", "n02105855", "n01751748", "n00000001"]
        (path / "data" / "meta.mat").write_bytes(_meta_mat(names, form.endswith("compressed")))
    elif form == "kaggle.csv":
        lines = ["{},{} 85 1 499 272 {} 3 4 5 6 ".format(n[:-5], c, c) for n, c in reversed(list(zip(NAMES, CLASSES)))]
        path.write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    elif form == "pairs.txt":
        path.write_text("".join("{} {}\n".format(name, label) for name, label in zip(NAMES, CLASSES)))
    else:
        path.write_text("\n".join(CLASSES))
    return path


@pytest.mark.parametrize("form", ["devkit_compressed", "devkit_plain", "kaggle.csv", "pairs.txt", "in_order.txt"])
def test_every_form_of_labels(form, val, tmp_path, capsys):
    labels = _write_labels(tmp_path, form)
    prepare_imagenet.main([str(val), str(labels)])
    assert files(val) == DONE
    assert all(path.read_text() == path.name for path in val.rglob("*.JPEG"))
    assert (val / "readme.txt").exists()
    assert capsys.readouterr().out == "4 of 4 images moved, the others were there; 3 class folders in {}\n".format(val)
    images = ImageFolder(str(tmp_path), "val", sorted(set(CLASSES)))
    assert [images.classes[target] for target in images.targets] == [name.split("/")[0] for name in DONE]


def test_again_and_after_an_interruption(val, tmp_path, capsys):
    labels = str(_write_labels(tmp_path, "kaggle.csv"))
    (val / CLASSES[2]).mkdir()
    shutil.move(str(val / NAMES[2]), str(val / CLASSES[2]))
    for expected in ("3 of 4 images moved", "0 of 4 images moved"):
        prepare_imagenet.main([str(val), labels])
        assert capsys.readouterr().out.startswith(expected) and files(val) == DONE


def test_links_leave_the_folder_alone(val, tmp_path):
    labels, out = _write_labels(tmp_path, "in_order.txt"), tmp_path / "out" / "val"
    for _ in range(2):
        command = [sys.executable, "-m", "common.prepare_imagenet", val, labels, "--link", out]
        process = run(command, cwd=ROOT)
        assert process.returncode == 0, process.stderr
        assert files(out) == DONE and files(val) == NAMES
    assert (out / DONE[0]).is_symlink() and (out / DONE[0]).read_text() == os.path.basename(DONE[0])


def refused(val, labels, *options):
    """Return the line of the refusal, which must have moved nothing."""
    before = files(val) if val.exists() else None
    with pytest.raises(UserError) as error:
        prepare_imagenet.main([str(val), str(labels), *options])
    assert before == (files(val) if val.exists() else None) and "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused(val, tmp_path):
    labels = _write_labels(tmp_path, "in_order.txt")
    assert "No such file" in refused(tmp_path / "none", labels)
    assert "No such file" in refused(val, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", labels).endswith("empty has no images")
    numbers = _write_labels(tmp_path, "devkit_plain") / "data" / "ILSVRC2012_validation_ground_truth.txt"
    assert "name the devkit's folder" in refused(val, numbers)
    numbers.write_text("1\n2\n3\n7\n")
    assert "do not fit each other" in refused(val, numbers.parent.parent)
    (tmp_path / "short").write_text("\n".join(CLASSES[:3]))
    assert "1 of 4 images have no class in the list: " + NAMES[3] in refused(val, tmp_path / "short")
    (tmp_path / "sorted").write_text("\n".join(sorted(CLASSES)))
    assert "is n09193705, not n01751748: the list is in another order" in refused(val, tmp_path / "sorted")
    (tmp_path / "words").write_text("sea snake\nalp\n")
    assert "no lines of the form" in refused(val, tmp_path / "words")
    (val / "n09193705").mkdir()
    shutil.copy(str(val / NAMES[0]), str(val / "n09193705"))
    assert "is both in '' and in 'n09193705'" in refused(val, labels)
    (val / NAMES[0]).unlink()
    assert "stands in n09193705/ and is of class n01751748" in refused(val, labels)


def test_the_commands_of_the_readme(val, tmp_path):
    """From archives in the form of ImageNet's to a folder that trains."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Bring ImageNet")[2]
    commands = section.partition("```sh\n")[2].partition("```")[0]
    devkit = _write_labels(tmp_path, "devkit_compressed")
    devkit.rename(tmp_path / "ILSVRC2012_devkit_t12")
    with tarfile.open(str(tmp_path / "ILSVRC2012_img_val.tar"), "w") as archive:
        for name in NAMES:
            archive.add(str(val / name), name)
    shutil.rmtree(str(val))
    with tarfile.open(str(tmp_path / "ILSVRC2012_img_train.tar"), "w") as archive:
        for label in sorted(set(CLASSES)):
            (tmp_path / "image").write_text(label)
            with tarfile.open(str(tmp_path / "inner.tar"), "w") as inner:
                inner.add(str(tmp_path / "image"), label + "_1.JPEG")
            archive.add(str(tmp_path / "inner.tar"), label + ".tar")
    commands = commands.replace("/data/imagenet", str(tmp_path / "imagenet")).replace(
        "python -m", sys.executable + " -m"
    )
    process = run(["bash", "-euc", commands], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert process.returncode == 0, process.stderr
    assert files(tmp_path / "imagenet" / "val") == DONE
    assert files(tmp_path / "imagenet" / "train") == sorted("{0}/{0}_1.JPEG".format(label) for label in set(CLASSES))
    assert list(ImageFolder(str(tmp_path / "imagenet"), "train").targets) == [0, 1, 2]


def test_a_folder_that_cannot_be_written(val, tmp_path):
    (tmp_path / "out").write_text("a file")
    line = refused(val, _write_labels(tmp_path, "in_order.txt"), "--link", str(tmp_path / "out"))
    assert "0 of 4 images are done" in line
