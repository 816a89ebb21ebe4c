"""Folders, order, draws and batches: against torchvision, and the same for any number of workers and ranks."""

import gc
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

from common import pack
from common.data import PADDING, ImageFolder, Loader, SyntheticLoader, epoch_order, find_classes
from common.device import seed_everything
from common.errors import Stopped, UserError
from common.transforms import CenterCrop, EncodedImage, RandomResizedCrop, Workers, import_torchvision
from common.weights import class_names, classes_of
from tests.helpers import LIMIT, ROOT, card, encoded, loader, pattern, photograph, run, seen, tiers, write_set

JPEG = encoded(pattern())


def test_the_order_is_a_function_of_seed_and_epoch():
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert np.array_equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    for seed, epoch in ((1, 3), (2, 2), (1 + 2**32, 2), (1 + 2**62, 2)):
        assert not np.array_equal(epoch_order(50, 1, 2), epoch_order(50, seed, epoch))
    repeated = epoch_order(50, 1, 2, repeats=3)
    assert np.array_equal(repeated[::3], epoch_order(50, 1, 2)) and np.array_equal(repeated[::3], repeated[2::3])


def draws(*key):
    """Return what each source of draws gives: crops, jitter, RandAugment, erasing, mixup, dropout."""
    seed_everything(*key)
    vision = import_torchvision().transforms
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.mixup import Mixup

    picture, batch, out = photograph(40, 40), torch.ones(4, 3, 8, 8), torch.empty(8, 8, 3, dtype=torch.uint8)
    found = {}
    RandomResizedCrop(8)(EncodedImage(JPEG), out)
    found["crop"] = out.numpy().tobytes()
    found["jitter"] = vision.ColorJitter(0.4, 0.4, 0.4, 0.1)(picture).tobytes()
    augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 10})
    found["randaugment"] = b"".join(augment(picture).tobytes() for _ in range(3))
    found["erasing"] = vision.RandomErasing(1.0, value="random")(batch[0]).numpy().tobytes()
    labels = torch.arange(4)
    found["mixup"] = Mixup(0.8, 1.0, num_classes=4)(batch * labels.view(-1, 1, 1, 1), labels)[0].numpy().tobytes()
    found["dropout"] = torch.nn.functional.dropout(torch.ones(64)).numpy().tobytes()
    found["noise of numpy"] = np.random.rand(4).tobytes()
    return found


def test_all_draws_differ_between_seeds_epochs_positions_and_ranks():
    """A seed, an epoch, a position in it and, for what is drawn behind the loader, a rank."""
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (5000000000, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**32, 0), (1, 1, 0)]
    keys += [(0, 0, 0, 1), (0, 0, 0, 2), (0, 1, 0, 1), (0, 0, 512, 1), (0, 0, 2**20, 1)]
    found = [draws(*key) for key in keys]
    for name in found[0]:
        distinct = len({one[name] for one in found})
        assert distinct == len(keys), "{}: {} of {}".format(name, distinct, len(keys))
    assert draws(*keys[1]) == found[1]


@pytest.mark.parametrize("count", tiers([200000], [1000000]))
def test_seeds_of_images_collide_no_more_often_than_chance(count):
    """Of a million seeds of 32 bits (all that numpy and torch's CPU generator take) 116 pairs are expected to."""
    seeds, patch = {"numpy": [], "torch": []}, pytest.MonkeyPatch()
    patch.setattr(np.random, "seed", seeds["numpy"].append)
    patch.setattr(torch, "default_generator", types.SimpleNamespace(manual_seed=seeds["torch"].append))
    for epoch in range(10):
        for position in range(count // 10):
            seed_everything(0, epoch, position)
    patch.undo()
    assert len(set(seeds["torch"])) == count
    for name, values in seeds.items():
        assert count - len({value % 2**32 for value in values}) < 2 * count**2 / 2**33 + 10, name


def test_the_folder_is_torchvisions(few_digits):
    import_torchvision()
    from torchvision.datasets import ImageFolder as Theirs

    for split in ("train", "val"):
        ours, theirs = ImageFolder(str(few_digits), split), Theirs(str(few_digits / split))
        assert ours.classes == theirs.classes
        assert [(ours.path(i), t) for i, t in enumerate(ours.targets)] == theirs.samples


@pytest.mark.parametrize("memory", [2**29, 0])  # bytes for batches; with 0 several workers share a batch
def test_workers_change_nothing(memory, few_digits, monkeypatch):
    monkeypatch.setattr("common.transforms.BATCH_BYTES", memory)
    alone, three = (loader(few_digits, True, workers=workers) for workers in (0, 3))
    assert alone.steps == 12  # 80 images in batches of 7: the last has 3
    for _ in range(2):
        for one, other in zip(alone.batches(epoch=1), three.batches(epoch=1)):
            assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)
            assert one[2:] == other[2:]


def test_an_epoch_that_is_left_early_does_not_disturb_the_next(few_digits):
    item = loader(few_digits, True, workers=2, batch_size=2)
    expected, _ = seen(loader(few_digits, True, batch_size=2), epoch=1)
    for _ in range(3):
        next(item.batches(epoch=0))
        assert torch.equal(seen(item, epoch=1)[0], expected)


def test_ranks_share_an_epoch_and_draw_the_same_crops(few_digits):
    whole, _ = seen(loader(few_digits, True, batch_size=8), epoch=3)
    parts = [list(loader(few_digits, True, rank, 4, batch_size=2).batches(epoch=3)) for rank in range(4)]
    for step in range(10):
        together = torch.stack([parts[rank][step].images for rank in range(4)], dim=1).flatten(0, 1)
        assert torch.equal(together, whole[step * 8 : step * 8 + 8])


def test_what_is_drawn_behind_the_loader_depends_on_epoch_position_and_rank(few_digits):
    def numbers(rank, epoch, start=0):
        return [torch.rand(1).item() for _ in loader(few_digits, True, rank, 2).batches(epoch, start)]

    found = numbers(0, 0) + numbers(1, 0) + numbers(0, 1) + numbers(1, 1)
    assert len(set(found)) == len(found) == 24  # 80 images: 5 batches of 14, and one of 10
    assert numbers(1, 1, start=28) == numbers(1, 1)[2:]


def test_unequal_last_batches_weigh_as_much_as_their_images(few_digits):
    """5 images for 2 ranks in the last batch: the mean over ranks of the weighted means is the mean over images."""
    last = [list(loader(few_digits, True, rank, 2, batch_size=25).batches(0, 25))[-1] for rank in range(2)]
    assert [len(batch.targets) for batch in last] == [3, 2]
    values = [batch.images.mean(dim=(1, 2, 3)) for batch in last]
    weighted = sum(batch.weight * value.mean() for batch, value in zip(last, values)) / 2
    assert weighted.item() == pytest.approx(torch.cat(values).mean().item(), rel=1e-6)
    assert [batch.weight for batch in last] == pytest.approx([1.2, 0.8])
    assert {batch.weight for batch in loader(few_digits, True, batch_size=8).batches()} == {1.0}


def test_a_batch_says_where_it_stands(few_digits):
    batches = list(loader(few_digits, True, 0, 2, batch_size=16).batches(epoch=3, start=16))
    assert [(batch.progress, batch.samples) for batch in batches] == [(3.2, 48), (3.6, 80)]


def test_evaluation_counts_every_image_once_and_pads(few_digits):
    targets = []
    for rank in range(4):
        batches = list(loader(few_digits, False, rank, 4, batch_size=5).batches())
        assert [batch.images.shape[0] for batch in batches] == [5, 5]
        targets += [batch.targets for batch in batches]
    counted = torch.cat(targets)
    assert sorted(counted[counted >= 0].tolist()) == sorted(list(range(10)) * 3)
    assert (counted == PADDING).sum().item() == 40 - 30


def test_evaluation_keeps_a_last_batch_however_small(few_digits):
    batches = [list(loader(few_digits, False, rank, 4, batch_size=7).batches()) for rank in range(4)]
    assert sum((batch.targets >= 0).sum().item() for of_rank in batches for batch in of_rank) == 30


def test_the_classes_of_val_are_those_of_train(tmp_path):
    write_set(tmp_path, {"cat/1.jpg": b"", "dog/1.jpg": b"", "emu/1.jpg": b""}, ["train"])
    write_set(tmp_path, {"cat/1.jpg": b"", "emu/1.jpg": b""}, ["val"])
    images = ImageFolder(str(tmp_path), "val")
    assert images.classes == ["cat", "dog", "emu"] and images.targets.tolist() == [0, 2]


def test_normalisation(few_digits):
    batch = next(loader(few_digits, False).batches())
    out = torch.empty(32, 32, 3, dtype=torch.uint8)
    CenterCrop(32, 36)(EncodedImage(ImageFolder(str(few_digits), "val").read(0)), out)
    expected = (out.permute(2, 0, 1) / 255.0 - 0.5) / 0.25
    assert torch.allclose(batch.images[0], expected, atol=1e-6)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_the_order_facts_name_what_the_order_depends_on(few_digits, tmp_path):
    facts = [loader(few_digits, True, batch_size=4).order_facts, loader(few_digits, True, 1, 2, workers=2).order_facts]
    assert facts[0] == facts[1]
    names = {"a/{}.jpg".format(i): JPEG for i in range(8)}
    one = loader(write_set(tmp_path / "one", names), True).order_facts
    other = loader(write_set(tmp_path / "other", {name.replace("7", "9"): JPEG for name in names}), True).order_facts
    assert {key for key in one if one[key] != other[key]} == {"names_crc32"}
    assert loader(few_digits, True, seed=9).order_facts["seed"] == 9


def test_synthetic_batches_have_the_place_of_real_ones():
    args = types.SimpleNamespace(batch_size=100000, seed=1, accumulate=1)
    item = SyntheticLoader(types.SimpleNamespace(prepare=torch.Tensor.clone, **vars(card(0, 2))), 1, 7, args)
    assert item.steps == 6 and item.steps_from(400000) == 4 and len(item) == 1200000
    batches = list(item.batches(epoch=2, start=800000))
    assert [(batch.progress, batch.samples, batch.weight) for batch in batches] == [
        (2 + 4 / 6, 1000000, 1.0),
        (2 + 5 / 6, 1200000, 1.0),
    ]
    assert not item.new_bad


def test_what_a_step_does_to_synthetic_images_does_not_reach_the_next():
    args = types.SimpleNamespace(batch_size=2, seed=1, accumulate=1)
    batches = SyntheticLoader(types.SimpleNamespace(prepare=torch.Tensor.clone, **vars(card())), 3, 7, args).batches()
    first = next(batches).images
    expected = first.clone()
    first.zero_()  # as random erasing does
    assert torch.equal(next(batches).images, expected)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_copies_of_an_image_are_no_neighbours_in_a_batch(world, tmp_path):
    """torchvision's MixUp and CutMix mix each image with the one before it."""
    folder = write_set(tmp_path, {"{}/{}.jpg".format(i % 2, i): JPEG for i in range(96)})
    args = types.SimpleNamespace(batch_size=12, workers=0, seed=5, max_bad_images=0.0, notices=[], accumulate=1)
    taken = []
    for rank in range(world):
        images = ImageFolder(folder, "train")
        images.image = lambda index, image=images.image: taken.append(index) or image(index)
        place = card(rank, world), images, RandomResizedCrop(8), args, (0.5,) * 3, (0.25,) * 3
        list(Loader(*place, training=True, repeats=4).batches(epoch=1))
    whole = epoch_order(96, 5, 1, repeats=4)
    assert sorted(taken) == sorted(whole[:96].tolist())
    batches = [taken[first : first + 12] for first in range(0, 96, 12)]
    assert all(batch[i] != batch[i - 1] for batch in batches for i in range(12))


LINE = "[Warning] {}/val is a pack of shorter side 32 at most, bilinear, raw: --size {} --interpolation {} "
LINE += "has the folder's Acc@1"


@pytest.mark.parametrize(
    "size, interpolation, is_folders", [(32, "bilinear", True), (36, "bilinear", False), (32, "bicubic", False)]
)
def test_an_evaluation_of_a_pack_that_was_made_for_another_says_so(
    size, interpolation, is_folders, few_digits, tmp_path
):
    root = write_set(tmp_path / "set", {"5/1.jpg": encoded(pattern())}, ["val"])
    assert pack.main([root, str(tmp_path / "packed"), "--size", "32"]) == 0
    for folder, expected in ((root, []), (str(tmp_path / "packed"), [] if is_folders else [LINE])):
        args = types.SimpleNamespace(batch_size=2, workers=0, seed=5, notices=[], accumulate=1)
        crop = CenterCrop(28, size, interpolation)
        Loader(card(), ImageFolder(folder, "val"), crop, args, (0.5,) * 3, (0.25,) * 3, training=False)
        assert args.notices == [line.format(folder, size, interpolation) for line in expected]


def test_ranks_that_would_train_on_other_images_are_refused(few_digits, monkeypatch):
    stand_in = card(0, 2)
    stand_in.ranks.all_gather = lambda value: [value, dict(value, images=39) if isinstance(value, dict) else value]
    monkeypatch.setattr("tests.helpers.card", lambda *_: stand_in)
    with pytest.raises(UserError, match="train: the nodes have other images, or another --seed or --repeats"):
        loader(few_digits, True)


@pytest.mark.parametrize("inside", ["train", "train/5", "train/5/deep"])
def test_a_folder_that_cannot_be_read_is_not_left_out(inside, tmp_path, monkeypatch):
    root, scandir = write_set(tmp_path, {"5/1.jpg": JPEG, "5/deep/2.jpg": JPEG, "7/1.jpg": JPEG}), os.scandir

    def broken(path):
        if str(path) == os.path.join(root, inside):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    assert len(ImageFolder(root, "train")) == 3
    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(UserError, match="^{} cannot be read: Input/output error$".format(os.path.join(root, inside))):
        ImageFolder(root, "train")


def test_a_data_set_that_the_user_may_not_enter_is_not_said_to_be_empty(tmp_path):
    root = write_set(tmp_path / "set", {"5/1.jpg": JPEG})
    os.chmod(root, 0)
    code = "import sys; from common import data; data.find_classes(sys.argv[1], 'train')"
    command = [sys.executable, "-c", code, root]
    if os.geteuid() == 0:  # who may read everything
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    process = run(command, cwd=ROOT)
    os.chmod(root, 0o755)
    assert "UserError: {}/train cannot be read: Permission denied".format(root) in process.stderr


# What a user may get wrong.


def refused(call, *args):
    """Return the line of the `UserError` that `call` raises."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hidden_folders_are_no_classes_and_hold_no_images(tmp_path):
    names = ["cat/1.jpg", "cat/.ipynb_checkpoints/1-checkpoint.jpg", "dog/deep/2.jpg", ".ipynb_checkpoints/3.jpg"]
    root = write_set(tmp_path, dict.fromkeys([*names, "__MACOSX/cat/1.jpg"], JPEG))
    for split in ("train", "val"):
        images = ImageFolder(root, split)
        assert images.classes == ["cat", "dog"] and images.notices == []
        assert [images.name(index) for index in range(len(images))] == ["cat/1.jpg", "dog/deep/2.jpg"]


@pytest.mark.parametrize(
    "links", [{"5/self": "."}, {"5/up": ".."}, {"5/one": ".", "5/two": "."}, {"5/l": "../7", "7/m": "../5"}]
)
def test_links_that_lead_back_are_refused(links, tmp_path):
    """Each image would count forty times, images of other classes too; two such links are followed for ever."""
    root = write_set(tmp_path, {"5/1.jpg": JPEG, "5/deep/2.jpg": JPEG, "7/1.jpg": JPEG}, ["train"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "3.jpg").write_bytes(JPEG)
    os.symlink(str(tmp_path / "other"), str(tmp_path / "train" / "9"))
    os.symlink(str(tmp_path / "other"), str(tmp_path / "train" / "5" / "more"))
    images = ImageFolder(root, "train")
    assert [images.name(i) for i in range(5)] == ["5/1.jpg", "5/deep/2.jpg", "5/more/3.jpg", "7/1.jpg", "9/3.jpg"]
    for name, target in links.items():
        os.symlink(target, str(tmp_path / "train" / name))
    assert re.search(
        "/(self|up|one|two|l/m) is a link to a folder that it lies in", refused(ImageFolder, root, "train")
    )


@pytest.mark.parametrize("names", [["9"], ["5", "7", "9"]])
def test_a_class_that_is_a_link_to_what_is_not_there_is_not_left_out(names, tmp_path):
    """As where a disk is not mounted: fewer classes would be trained, with other numbers."""
    root = write_set(tmp_path, {"5/1.jpg": JPEG, "7/1.jpg": JPEG}, ["train"])
    for name in names:
        shutil.rmtree(str(tmp_path / "train" / name), ignore_errors=True)
        os.symlink("/not/mounted", str(tmp_path / "train" / name))
    line = "{}/train/{} cannot be read: No such file or directory".format(root, names[0])
    assert refused(ImageFolder, root, "train") == line


def test_classes_without_images_are_named_in_a_line(tmp_path):
    root = write_set(tmp_path, {"cat/1.jpg": JPEG, "dog/1.jpg": JPEG, "emu/1.jpg": JPEG})
    assert ImageFolder(root, "train").notices == ImageFolder(root, "val").notices == []
    (tmp_path / "train" / "fox").mkdir()
    os.remove(str(tmp_path / "val" / "emu" / "1.jpg"))
    os.remove(str(tmp_path / "val" / "dog" / "1.jpg"))
    os.rmdir(str(tmp_path / "val" / "dog"))
    assert ImageFolder(root, "train").notices == [
        "[Warning] {}/train has no images of 1 of 4 classes: fox".format(tmp_path)
    ]
    images = ImageFolder(root, "val")
    assert images.notices == ["[Warning] {}/val has no images of 3 of 4 classes: dog, emu, fox".format(tmp_path)]
    assert images.targets.tolist() == [0]
    notices = []
    loader(root, False, notices=notices, images=images)
    assert notices == images.notices  # for the log


def test_flat_and_wrong_folders_are_refused_with_the_cure(tmp_path):
    root = tmp_path / "set"
    write_set(root, {"cat/1.jpg": JPEG}, ["train"])
    (root / "val").mkdir()
    assert refused(find_classes, str(root), "val").startswith("{}/val has no class folders: sort".format(root))
    (root / "val" / "1.jpg").write_bytes(JPEG)
    line = refused(ImageFolder, str(root), "val")
    assert "val has no class folders: sort its images into one sub-folder per class" in line
    line = refused(find_classes, str(root / "train"), "train")
    assert line == "data set {}/train has no train/ folder".format(root)
    assert refused(find_classes, str(tmp_path), "train") == "data set {} has no train/ folder".format(tmp_path)
    (root / "val" / "emu").mkdir()
    (root / "val" / "emu" / "1.jpg").write_bytes(JPEG)
    assert "val has 1 class folders that train/ does not know: emu" in refused(ImageFolder, str(root), "val")
    (root / "empty" / "train" / "cat").mkdir(parents=True)
    assert "train has no images (.jpg" in refused(ImageFolder, str(root / "empty"), "train")


def options(**values):
    """Stand in for the options that class names depend on."""
    defaults = {"evaluate": False, "synthetic": False, "classes_by_position": False, "pretrained": None, "data": None}
    return types.SimpleNamespace(**dict(dict(defaults, num_classes=None, notices=[]), **values))


def evaluated(root, classes, **values):
    """Return (names of the outputs, target of each image, lines) of an evaluation of a checkpoint with `classes`."""
    args, content = options(evaluate=True, data=root, **values), {"classes": classes} if classes else {}
    images = ImageFolder(root, "val", classes_of(content, args))
    names = class_names(args, content, types.SimpleNamespace(images=images))
    return names, images.targets.tolist(), images.notices + args.notices


@pytest.mark.parametrize("splits", [("val",), ("train", "val")])
def test_an_evaluation_counts_by_the_checkpoints_class_names(splits, tmp_path):
    root = write_set(tmp_path, {"cat/1.jpg": JPEG, "dog/1.jpg": JPEG, "emu/1.jpg": JPEG}, splits)
    assert evaluated(root, ["emu", "cat", "dog"]) == (["emu", "cat", "dog"], [1, 2, 0], [])
    with pytest.raises(UserError, match=r"\b(fox|emu)\b.*[;:] --classes-by-position "):
        evaluated(root, ["cat", "dog", "fox"])
    names, targets, notices = evaluated(root, ["cat", "dog", "fox"], classes_by_position=True)
    assert names == ["cat", "dog", "fox"] and targets == [0, 1, 2]
    assert notices == [
        "[Warning] the classes of the checkpoint (cat, dog, fox) stand for others here, by their positions: "
        "cat, dog, emu"
    ]
    with pytest.raises(UserError, match=r"the network has 2 classes .* has 3 class folders"):
        evaluated(root, ["cat", "dog"], classes_by_position=True)
    assert evaluated(root, None) == (["cat", "dog", "emu"], [0, 1, 2], [])  # an official checkpoint


def test_val_alone_may_have_some_of_the_checkpoints_classes(tmp_path):
    root = write_set(tmp_path, {"cat/1.jpg": JPEG, "emu/1.jpg": JPEG}, ["val"])
    names, targets, notices = evaluated(root, ["ant", "cat", "dog", "emu"])
    assert names == ["ant", "cat", "dog", "emu"] and targets == [1, 3]
    assert notices == ["[Warning] {}/val has no images of 2 of 4 classes: ant, dog".format(tmp_path)]


def test_extra_classes_have_names_of_their_own(tmp_path):
    """An older checkpoint has two classes called 7: the folder's was the first."""
    root = write_set(tmp_path, {"5/1.jpg": JPEG, "7/1.jpg": JPEG})
    images = types.SimpleNamespace(images=ImageFolder(root, "train"))
    names = class_names(options(data=root, num_classes=8), None, images)
    assert names == ["5", "7"] + ["(unused {})".format(number) for number in range(2, 8)]
    assert evaluated(root, names) == (names, [0, 1], [])
    alone = write_set(tmp_path / "alone", {"5/1.jpg": JPEG, "7/1.jpg": JPEG}, ["val"])
    assert evaluated(alone, ["5", "7", "2", "3", "4", "5", "6", "7"])[1] == [0, 1]
    with pytest.raises(UserError, match=r"the network has 1 classes \(--num-classes\), .* has 2 class folders"):
        class_names(options(data=root, num_classes=1), None, images)
    assert class_names(options(synthetic=True, num_classes=3), None, None) == ["0", "1", "2"]
    assert len(class_names(options(), {})) == 1000


def test_a_head_of_other_classes_is_named_in_a_line(tmp_path):
    root = write_set(tmp_path, {"cat/1.jpg": JPEG, "dog/1.jpg": JPEG})
    images = types.SimpleNamespace(images=ImageFolder(root, "train"))
    for known, count in ((["ant", "bee"], 1), (["cat", "dog"], 0), (["ant", "bee", "cat"], 0)):
        args = options(data=root, pretrained="official.pth")
        assert class_names(args, {"classes": known}, images) == ["cat", "dog"]
        assert len(args.notices) == count
    assert class_names(options(pretrained="official.pth"), {"classes": ["ant", "bee"]}) == ["ant", "bee"]  # --export


def test_workers_by_default_are_the_ranks_share_of_the_cores_it_may_use(few_digits, monkeypatch):
    """None is left idle: 8 ranks have 6 of 42 cores each."""
    made = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(42), raising=False)
    monkeypatch.setattr("common.data.Workers", lambda write, count, *_: made.append(count))
    loader(few_digits, True, workers=None)
    stand_in = card(0, 1)
    stand_in.type, stand_in.ranks.local_world_size = "npu", 8  # whose ranks share the cores
    monkeypatch.setattr("tests.helpers.card", lambda *_: stand_in)
    for stand_in.cores in (42, 192, 1):
        loader(few_digits, True, workers=None)
    assert made == [42, 6, 24, 1]


def test_workers_say_nothing_and_end_with_their_loader(few_digits, capfd):
    before = set(multiprocessing.active_children())
    item = loader(few_digits, True, workers=3)
    next(item.batches())
    workers = set(multiprocessing.active_children()) - before
    del item
    gc.collect()
    for worker in workers:
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [0] * 3 and capfd.readouterr() == ("", "")


def test_workers_end_with_a_process_that_still_has_its_loader(few_digits):
    code = "from tests.helpers import loader; item = loader({!r}, True, workers=2); next(item.batches())"
    subprocess.run([sys.executable, "-c", code.format(str(few_digits))], cwd=str(ROOT), check=True, timeout=900)


def shared_memory(field):
    """Return the bytes of this process's anonymous shared memory by `field` of /proc/self/smaps."""
    total, counts = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if re.match("[0-9a-f]+-", line):
                counts = "/dev/zero" in line
            elif counts and line.startswith(field + ":"):
                total += 1024 * int(line.split()[1])
    return total


def test_eight_ranks_on_192_cores_need_less_than_16_gib(few_digits, monkeypatch):
    """ShuffleNetV2's recipe: 1024 images a rank. train/ and val/ together take 1 GiB at most, when they are written."""
    gc.collect()
    monkeypatch.setattr("common.transforms.Workers._start", lambda self: None)
    before, many, stand_in = shared_memory("Size"), ImageFolder(str(few_digits), "train"), card(0, 8)
    many.names, many.targets = np.tile(many.names, 625), np.tile(many.targets, 625)
    stand_in.type, stand_in.cores = "npu", 192
    monkeypatch.setattr("tests.helpers.card", lambda *_: stand_in)
    items = [
        loader(few_digits, training, 0, 8, CenterCrop(224, 256), many, batch_size=1024, workers=None)
        for training in (True, False)
    ]
    size = 1024 * 224 * 224 * 3
    assert 2 * 2 * size <= shared_memory("Size") - before <= 2**30
    assert shared_memory("Rss") < 2**20 and len(items) == 2


def test_the_rank_that_sees_least_memory_decides_for_all(few_digits, monkeypatch):
    stand_in = card(0, 2)
    stand_in.ranks.all_gather = lambda value: [value, 10000 if isinstance(value, int) else value]
    monkeypatch.setattr("tests.helpers.card", lambda *_: stand_in)
    with pytest.raises(UserError, match=r"batches in memory need \d+ MB, 0 MB are free: fewer --workers"):
        loader(few_digits, True)


def test_what_a_worker_raises_is_raised_here(capfd):
    def write(rows, key, items):
        raise UserError("no {}".format(items))

    with pytest.raises(UserError, match=r"^no \[3, 4\]$"):
        list(Workers(write, 1, (4, 1), card().ranks).batches([(None, [3, 4])]))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [2000000, 10**9])  # of the second 64 bits cannot count the bytes
def test_too_little_memory_is_refused(size, few_digits):
    with pytest.raises(UserError, match=r"batches in memory need \d{8,} MB, \d+ MB are free: fewer --workers"):
        loader(few_digits, True, transform=RandomResizedCrop(size), batch_size=4)


def test_too_few_images_for_the_ranks(few_digits):
    with pytest.raises(UserError, match="train has 80 images, fewer than two a rank"):
        loader(few_digits, True, world_size=41)


# Signals, and workers that hang or are killed.


class Hanging(CenterCrop):
    """Hangs in the worker when it meets image number `image` of the set."""

    def __init__(self, image):
        super().__init__(32, 36)
        self.image, self.met = image, 0

    def __call__(self, image, out):
        self.met += 1
        if self.met > self.image:
            time.sleep(60)
        super().__call__(image, out)


@pytest.mark.parametrize("training", [True, False])
def test_a_signal_ends_the_wait_for_a_batch(training, few_digits):
    item = loader(few_digits, training, workers=1, batch_size=4, transform=Hanging(8))  # a batch is taken ahead
    batches = item.batches()
    assert len(next(batches).targets) == 4
    item._ranks.stop_signal = int(signal.SIGTERM)
    with pytest.raises(Stopped) as caught:  # the batch would come after a minute
        next(batches)
    assert caught.value.args == (signal.SIGTERM,)
    kill_workers()


def test_a_signal_does_not_lose_a_batch_that_comes(few_digits, monkeypatch):
    """The first wait is in vain. Then it has a second; here as long as a slow machine needs."""
    poll, vain = Connection.poll, [True]
    monkeypatch.setattr(Connection, "poll", lambda pipe, _: not (vain and vain.pop()) and poll(pipe, LIMIT))
    item = loader(few_digits, True, workers=1, batch_size=40)
    item._ranks.stop_signal = int(signal.SIGTERM)
    assert [len(batch.targets) for batch in item.batches()] == [40, 40]


def test_a_killed_worker_is_one_line(few_digits):
    batches = loader(few_digits, True, workers=2, batch_size=2).batches()
    next(batches)
    kill_workers()
    with pytest.raises(UserError, match=r"a decoding process was killed \(out of memory\?"):
        list(batches)


def kill_workers():
    for child in multiprocessing.active_children():
        child.kill()


def test_workers_ignore_signals(few_digits):
    """The rank decides when to end; a Ctrl-C reaches all processes of the terminal."""
    import multiprocessing

    item = loader(few_digits, True, workers=2, batch_size=2)
    batches = item.batches()
    next(batches)
    for child in multiprocessing.active_children():
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(child.pid, signum)
    assert len(list(batches)) == item.steps - 1


def test_images_of_a_seed_do_not_depend_on_what_was_drawn_before(few_digits):
    random.seed(1)
    first, _ = seen(loader(few_digits, True), epoch=1)
    random.seed(2)
    assert torch.equal(first, seen(loader(few_digits, True), epoch=1)[0])


def test_the_pixels_of_a_batch_stay_while_it_is_used(few_digits):
    """Slots of the shared memory are written again only after their batch was handed on."""
    item = loader(few_digits, True, workers=2, batch_size=2)
    batches = [(batch.images, batch.images.clone()) for batch in item.batches()]
    assert all(torch.equal(*pair) for pair in batches)
