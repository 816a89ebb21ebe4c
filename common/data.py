"""Images of class folders or of a pack, in the order of an epoch, as batches on the device.

The order and every random draw are functions of (seed, epoch, position), never of workers or ranks.
"""

import itertools
import math
import os
import time
import typing
import zlib

import numpy as np
import torch

from common.device import seed_everything
from common.errors import UserError, printable
from common.transforms import UNREADABLE, Workers

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
PADDING = -1  # target of a row that only fills up a batch
UNUSED = "(unused {})"  # name of a class that no folder has


def has_split(root, split):
    """Return whether DIR/`split` is there, as a folder or a pack."""
    return any(os.path.exists(os.path.join(root, split + suffix)) for suffix in ("", ".pack"))


def _open_pack(root, split):
    """Return the `common.pack.Pack` of DIR/`split`, or None where it is not packed."""
    if not os.path.isfile(os.path.join(root, split + ".pack")):
        return None
    from common.pack import Pack  # only where there is one

    return Pack(os.path.join(root, split))


def find_classes(root, split):
    """Return the sorted class names of DIR/`split`, a folder or a pack; raises UserError where there are none."""
    folder, parent, pack = os.path.join(root, split), os.path.dirname(os.path.abspath(root)), _open_pack(root, split)
    if not has_split(root, split):
        cure = "; {} has one".format(parent) if has_split(parent, split) else ""
        raise UserError("data set {} has no {}/ folder{}".format(root, split, cure))
    try:
        classes = pack.classes if pack else [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError as error:
        raise UserError("{}: {}".format(folder, error.strerror)) from None
    classes = sorted(name for name in classes if not _is_hidden(name))
    if not classes:
        what = "images, but no class folders" if image_names(folder) else "no class folders"
        text = "{} has {}: sort them into one sub-folder per class (README tells how to sort ImageNet's archives)"
        raise UserError(text.format(folder, what))
    return classes


def _is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"  # notebooks and archives leave such folders


def image_names(root, inside=""):
    """Return the names, relative to `root`, of all image files below its folder `inside`, in torchvision's order."""
    names = []
    for folder, _, files in sorted(os.walk(os.path.join(root, inside), followlinks=True)):
        parts = [part for part in os.path.relpath(folder, root).split(os.sep) if part != os.curdir]
        if not any(map(_is_hidden, parts)):
            names += [os.path.join(*parts, name) for name in sorted(files) if name.lower().endswith(EXTENSIONS)]
    return names


class Images:
    """Image files of one folder.

    Attributes:
        folder: that all of them lie in.
        names: relative to it, numpy bytes [n]: workers would copy a list, page by page, by counting its references.
        targets: numpy int64 [n].
        notices: lines for the log.
    """

    def __init__(self, folder, names, targets):
        self.folder, self.targets, self.notices = folder, np.array(targets, dtype=np.int64), []
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self):
        return len(self.targets)

    def name(self, index):
        """Return the name of image `index`, relative to the folder."""
        return os.fsdecode(bytes(self.names[index]))

    def path(self, index):
        """Return the path of image `index`."""
        return os.path.join(self.folder, self.name(index))

    def read(self, index):
        """Return the bytes of image `index`; raises OSError where it cannot be read."""
        path = self.path(index)
        if not os.path.isfile(path):  # to open a pipe is to wait for its writer
            raise OSError("there is no such file, or it is no ordinary one")
        with open(path, "rb") as file:
            return file.read()


def find_images(path):
    """Return the `Images` that `path` is or holds, their targets being their own numbers; UserError without any."""
    folder, names = path, image_names(path)
    if os.path.isfile(path):
        folder, names = os.path.dirname(path), [os.path.basename(path)]
    if not names:
        raise UserError("{} has no images ({})".format(path, " ".join(EXTENSIONS)))
    return Images(folder, names, range(len(names)))


class ImageFolder(Images):
    """The images of DIR/train or DIR/val, in torchvision's order; `classes` are the names that `targets` number."""

    def __init__(self, root, split, classes=None):
        """Find the images of `root`/`split`. Unless given, the `classes` are those of train/ if it is there.

        Raises UserError where there are no images, or a class folder has an unknown name.
        """
        folder, folders, self._pack = os.path.join(root, split), find_classes(root, split), _open_pack(root, split)
        names = self._pack.names if self._pack else [name for inside in folders for name in image_names(folder, inside)]
        if len(names) == 0:
            raise UserError("{} has no images ({})".format(folder, " ".join(EXTENSIONS)))
        self.classes = classes or find_classes(root, "train" if has_split(root, "train") else split)
        targets = {name: target for target, name in reversed(list(enumerate(self.classes)))}
        unknown = [name for name in folders if name not in targets]
        if unknown:
            text = "{} has {} class folders that train/ does not know: {}"
            if classes:
                text = "{} has {} class folders that the checkpoint does not know: {}; --classes-by-position takes "
                text += "the folders in alphabetical order, whatever their names"
            raise UserError(text.format(folder, len(unknown), first_of(unknown)))
        super().__init__(folder, names, [targets[name.split(os.sep)[0]] for name in map(os.fsdecode, names)])
        empty = set(range(len(self.classes))).difference(self.targets.tolist())
        empty = [self.classes[target] for target in sorted(empty) if self.classes[target] != UNUSED.format(target)]
        if empty:
            text = "[Warning] {} has no images of {} of {} classes: {}"
            self.notices.append(text.format(folder, len(empty), len(self.classes), first_of(empty)))

    def read(self, index):
        """Return the bytes of image `index`; raises OSError where it cannot be read."""
        return self._pack.read(index) if self._pack else super().read(index)


def first_of(names):
    """Return the first of `names`, as text for a line."""
    return printable(", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))


class Batch(typing.NamedTuple):
    """What a step takes."""

    images: torch.Tensor  # float32 [B, 3, S, S]
    targets: torch.Tensor  # int64 [B]
    weight: float  # of this rank's mean loss, so that the mean over ranks is the mean over images
    progress: float  # epochs done before the step
    samples: int  # of the epoch's order, done by all ranks after the step


def epoch_order(length, seed, epoch, repeats=1):
    """Return the order of an epoch's samples, numpy int64 [length * repeats]: a permutation, each entry repeated.

    A repeated entry's copies stand side by side, so that they reach different ranks (Hoffer et al., 2019).
    """
    key = [seed % 2**32, epoch] + ([seed >> 32] if seed >> 32 else [])
    return np.repeat(np.random.RandomState(key).permutation(length), repeats)


class Loader:
    """Batches of an `ImageFolder` on the device.

    In training every rank takes every world_size-th sample of the epoch's order, and the next image stands in for one
    that cannot be read. In evaluation rank r takes the images r, r + world_size, ..., each once, unreadable ones with
    the target `UNREADABLE`; the last batch is padded to the common shape with targets `PADDING`.

    Attributes:
        steps: number of batches of an epoch.
        wait_seconds: that `batches` has waited for workers.
        bad: {index: reason} of images that could not be read, of all ranks: by the run in training, else by this epoch.
        unnamed: (path, reason) of those that the log has not named yet.
        order_facts: what the order of samples depends on.
    """

    def __init__(self, card, images, transform, args, mean, std, training, repeats=1):
        """Set up the workers; mean and std are those of the channels, in units of 1 = white.

        With `repeats` each image stands so often in an epoch (repeated augmentation), which keeps its length.
        Raises UserError where there are fewer images than ranks, or too little memory.
        """
        self._card, self._ranks, self._world = card, card.ranks, card.ranks.world_size
        self.images, self.training, self._repeats, self._seed = images, training, repeats, args.seed
        self._batch_size = args.batch_size if training else min(args.batch_size, -(-len(images) // self._world))
        self.steps = self.steps_from(0)
        if self.steps == 0:
            raise UserError("{} has {} images: too few for {} ranks".format(images.folder, len(images), self._world))
        names = zlib.crc32(images.names.tobytes())
        self.order_facts = {"seed": args.seed, "repeats": repeats, "images": len(images), "names_crc32": names}
        self.wait_seconds, self.bad, self.unnamed, self._known_bad, self._unshared = 0.0, {}, [], set(), []
        self._share = args.max_bad_images
        self._allowed = max(1, int(self._share * len(images) + 1e-9)) if self._share else 0
        tries = min(len(images), self._allowed + 1) if training else 1  # with more bad ones the run ends
        count, seed = min(_count_workers(args, card), self.steps), args.seed if training else None
        self._workers = Workers(images, transform, self._batch_size, count, seed, tries, card.ranks)
        # One factor for each number of a row of pixels: processors multiply rows, not three channels, at full speed.
        scale = 1 / (255 * torch.tensor(std))
        shift = -torch.tensor(mean) * 255 * scale
        self._scale, self._shift = (values.repeat(transform.size).to(card.torch_device) for values in (scale, shift))
        args.notices += [line for line in images.notices if line not in args.notices]

    def __len__(self):
        return len(self.images)

    def steps_from(self, start):
        """Return how many batches an epoch has from sample `start` on; the last one may be smaller.

        In training it is left out when a rank would get fewer than 2 images, which BatchNorm cannot take.
        """
        whole, rest = divmod(len(self) - start, self._batch_size * self._world)
        return whole + (rest > 0 if not self.training else rest >= 2 * self._world)

    def batches(self, epoch=0, start=0):
        """Yield each `Batch` of `epoch` from sample `start` of its order on; in training seed all draws before it.

        Raises UserError where no image can be read, or a worker was killed; Stopped where a signal ends the wait.
        """
        self.bad = self.bad if self.training else {}
        order = epoch_order(len(self), self._seed, epoch, self._repeats) if self.training else np.arange(len(self))
        total = self._batch_size * self._world
        places = [range(first, min(first + total, len(self))) for first in range(start, len(self), total)]
        places = places[: self.steps_from(start)]  # of all ranks
        own = (positions[self._ranks.rank :: self._world] for positions in places)
        crops = self._workers.batches((epoch, positions, order[positions].tolist()) for positions in own)
        for positions in places:
            began = time.perf_counter()
            pixels, targets, bad = next(crops)
            self.wait_seconds += time.perf_counter() - began
            self._unshared += bad
            weight = len(targets) * self._world / len(positions)
            if not self.training:
                targets += [PADDING] * (self._batch_size - len(targets))
            elif UNREADABLE in targets:
                self.bad.update(self._unshared)
                raise self._too_many_bad()
            else:
                seed_everything(self._seed, epoch, positions[0], self._ranks.rank + 1)
            images, targets = self._normalise(pixels[: len(targets)]), self._card.upload(torch.tensor(targets))
            yield Batch(images, targets, weight, epoch + positions[0] / len(self), positions[-1] + 1)

    def _normalise(self, pixels):
        """Return uint8 `pixels` [B, S, S, 3] as float32 images [B, 3, S, S] on the device."""
        rows = self._card.upload(pixels).flatten(2).to(torch.float32)
        images = torch.addcmul(self._shift, rows, self._scale, out=rows).view(pixels.shape).permute(0, 3, 1, 2)
        return images if self._card.channels_last else images.contiguous()

    @property
    def new_bad(self):
        """How many bad images this rank has not told the others yet."""
        return len(self._unshared)

    def share_bad(self):
        """Gather the bad images of all ranks, which all call this; in training UserError where they are too many."""
        for index, reason in sorted(itertools.chain(*self._ranks.all_gather(self._unshared))):
            self.bad[index] = reason
            if index not in self._known_bad:
                self._known_bad.add(index)
                self.unnamed.append((printable(self.images.path(index)), reason))
        self._unshared = []
        if self.training and len(self.bad) > self._allowed:
            raise self._too_many_bad()

    def _too_many_bad(self):
        count, cure = len(self.bad), "there is no other to train on"
        if count < len(self):
            cure = "--max-bad-images {:g} allows {}".format(math.ceil(1000 * count / len(self)) / 1000, count)
        text = "{} of {} images of {} cannot be read; {:g} of them, that is {}, are allowed; {}: ".format(
            count, len(self), self.images.folder, self._share, self._allowed, cure
        )
        listed = ["{} ({})".format(self.images.path(index), reason) for index, reason in sorted(self.bad.items())[:10]]
        return UserError(text + "; ".join(listed))


def _count_workers(args, card):
    """Return how many processes decode for this rank: `--workers`, or its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    if card.type != "cpu":  # there each rank has its own cores
        cores = max(1, cores // card.ranks.local_world_size)
    line = "[Warning] --workers {} for {} cores: a few per core are enough".format(args.workers, cores)
    if args.workers is not None and args.workers > 4 * cores and line not in args.notices:
        args.notices.append(line)
    return cores if args.workers is None else args.workers


class SyntheticLoader:
    """One batch of random images and targets, held on the device, again and again; an epoch has ImageNet's length."""

    wait_seconds, new_bad = 0.0, 0

    def __init__(self, card, size, num_classes, args):
        self._ranks, self._seed, self._total = card.ranks, args.seed, args.batch_size * card.ranks.world_size
        generator = torch.Generator().manual_seed(args.seed + card.ranks.rank)
        self._images = card.prepare(torch.randn(args.batch_size, 3, size, size, generator=generator))
        self._targets = torch.randint(num_classes, (args.batch_size,), generator=generator).to(card.torch_device)
        self.steps = max(1, 1281167 // self._total)
        self.order_facts = {"seed": args.seed, "repeats": 1, "images": 0, "names_crc32": 0}

    def __len__(self):
        return self.steps * self._total

    def steps_from(self, start):
        """Return how many batches an epoch has from sample `start` on."""
        return self.steps - start // self._total

    def batches(self, epoch=0, start=0):
        """Yield the same `Batch` as often as an epoch has steps."""
        for first in range(start, start + self.steps_from(start) * self._total, self._total):
            seed_everything(self._seed, epoch, first, self._ranks.rank + 1)
            yield Batch(self._images, self._targets, 1.0, epoch + first / len(self), first + self._total)
