"""Images of class folders or of a pack, in the order of an epoch, as batches on the device.

The order and every random draw are functions of (seed, epoch, position), never of workers or ranks.
"""

import functools
import itertools
import os
import pathlib
import time
import typing
import zlib

import numpy as np
import torch

from common.device import seed_everything
from common.errors import UserError, first_of, printable, refuse
from common.transforms import EncodedImage, Workers, reason_of

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
PADDING, UNREADABLE = -1, -2  # targets of a row that only fills up a batch, of an image that cannot be read
UNUSED = "(unused {})"  # name of a class that no folder has


def has_split(root, split):
    """Return whether DIR/`split` is there, as a folder or a pack."""
    return any(os.path.exists(os.path.join(root, split + suffix)) for suffix in ("", ".pack"))


def _open_pack(folder):
    if os.path.isfile(folder + ".pack"):
        from common.pack import Pack  # only where there is one

        return Pack(folder)


def find_classes(root, split):
    """Return the sorted class names of DIR/`split`, a folder or a pack; raises UserError where there are none."""
    folder = os.path.join(root, split)
    pack = _open_pack(folder)
    if pack:
        return pack.classes
    if not os.path.isdir(folder) and os.access(root, os.X_OK):  # else it cannot be seen
        raise UserError("data set {} has no {}/ folder".format(root, split))
    _, folders, files = next(os.walk(folder, onerror=refuse))
    # A link to what is not there is a class, too: it is refused when its images are looked for.
    folders += [name for name in files if not os.path.exists(os.path.join(folder, name))]
    classes = sorted(name for name in folders if not _is_hidden(name))
    if not classes:
        cure = "sort its images into one sub-folder per class (README tells how for ImageNet)"
        raise UserError("{} has no class folders: {}".format(folder, cure))
    return classes


def _is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"  # notebooks and archives leave such folders


def image_names(root, inside=""):
    """Return the names, relative to `root`, of all image files below its folder `inside`, in torchvision's order."""
    found = {}
    for folder, folders, files in os.walk(os.path.join(root, inside), onerror=refuse, followlinks=True):
        if os.path.islink(folder) and os.path.realpath(folder) in map(os.path.realpath, pathlib.Path(folder).parents):
            raise UserError("{} is a link to a folder that it lies in: remove it".format(folder))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        place = folder[len(root) :].lstrip(os.sep)
        found[folder] = [os.path.join(place, name) for name in sorted(files) if name.lower().endswith(EXTENSIONS)]
    return [name for folder in sorted(found) for name in found[folder]]


class Images:
    """Images below `folder`, or in its `pack`: `names` (bytes [n]), `targets` (int64 [n]), `notices` for the log."""

    def __init__(self, folder, names, targets, pack=None):
        if len(names) == 0:
            raise UserError("{} has no images ({})".format(folder, " ".join(EXTENSIONS)))
        self.folder, self._pack, self.notices = folder, pack, []
        self.pixels = pack.pixels if pack else "of the files"
        # Arrays, for workers would copy a list, page by page, by counting its references.
        self.names, self.targets = np.array([os.fsencode(name) for name in names]), np.array(targets, dtype=np.int64)

    def __len__(self):
        return len(self.targets)

    def name(self, index):
        """Return the name of image `index`, relative to the folder."""
        return os.fsdecode(bytes(self.names[index]))

    def path(self, index):
        """Return the path of image `index`."""
        return os.path.join(self.folder, self.name(index))

    def image(self, index):
        """Return image `index`, an `EncodedImage` or a `pack.RawImage`; raises whatever the decoders raise."""
        return self._pack.image(index) if self._pack else EncodedImage(self.read(index))

    def read(self, index):
        """Return the bytes of the file of image `index`; raises OSError where it cannot be read."""
        path = self.path(index)
        if not os.path.isfile(path):  # to open a pipe is to wait for its writer
            raise OSError("there is no such file, or it is no ordinary one")
        with open(path, "rb") as file:
            return file.read()


class ImageFolder(Images):
    """The images of DIR/train or DIR/val, in torchvision's order; `classes` are the names that `targets` number."""

    def __init__(self, root, split, classes=None):
        """Find them. Unless given, the `classes` are those of train/ if it is there.

        Raises UserError where there are no images, or a class folder has an unknown name.
        """
        folder, folders = os.path.join(root, split), find_classes(root, split)
        self.classes = classes or find_classes(root, "train" if has_split(root, "train") else split)
        numbers = {name: number for number, name in reversed(list(enumerate(self.classes)))}  # of two the first counts
        unknown = [name for name in folders if name not in numbers]
        if unknown:
            text = "{} has {} class folders that {} does not know: {}"
            text += "; --classes-by-position takes the folders in alphabetical order" if classes else ""
            known = "the checkpoint" if classes else "train/"
            raise UserError(text.format(folder, len(unknown), known, first_of(unknown)))
        pack = _open_pack(folder)
        names = pack.names if pack else [name for inside in folders for name in image_names(folder, inside)]
        super().__init__(folder, names, [numbers[os.fsdecode(name).split(os.sep)[0]] for name in names], pack)
        seen = set(self.targets.tolist())
        empty = [name for i, name in enumerate(self.classes) if i not in seen and name != UNUSED.format(i)]
        if empty:
            text = "[Warning] {} has no images of {} of {} classes: {}"
            self.notices.append(text.format(folder, len(empty), len(self.classes), first_of(empty)))


class Batch(typing.NamedTuple):
    """What a step takes."""

    images: torch.Tensor  # float32 [B, 3, S, S]
    targets: torch.Tensor  # int64 [B]
    weight: float  # of this rank's mean loss, so that the mean over ranks of a step's sum is the mean over its images
    progress: float  # epochs done before the step
    samples: int  # of the epoch's order, done by all ranks after this batch
    ends_step: bool = True  # with `--accumulate` a step of the optimizer takes several batches


def epoch_order(length, seed, epoch, repeats=1):
    """Return the order of an epoch's samples, numpy int64 [length * repeats]: a permutation, each entry repeated.

    A repeated entry's copies stand side by side, so that they reach different ranks (Hoffer et al., 2019).
    """
    key = [seed % 2**32, epoch] + ([seed >> 32] if seed >> 32 else [])
    return np.repeat(np.random.RandomState(key).permutation(length), repeats)


class Loader:
    """Batches of an `ImageFolder` on the device; a step takes `accumulate` of them in training, `steps` are an epoch.

    In training every rank takes every world_size-th sample of the epoch's order, and the next image stands in for one
    that cannot be read. In evaluation rank r takes the images r, r + world_size, ..., each once, unreadable ones with
    the target `UNREADABLE`; the last batch is padded to the common shape with targets `PADDING`.
    """

    def __init__(self, card, images, transform, args, mean, std, training, repeats=1):
        """Set up the workers; mean and std are those of the channels, in units of 1 = white. All ranks call this.

        With `repeats` each image stands so often in an epoch (repeated augmentation), which keeps its length.
        Raises UserError where there are fewer images than ranks, or too little memory.
        """
        self._card, self._ranks, self._world = card, card.ranks, card.ranks.world_size
        self.images, self._transform, self.training = images, transform, training
        self._seed, self._repeats = args.seed, repeats
        self._batch_size = args.batch_size if training else min(args.batch_size, -(-len(images) // self._world))
        self._accumulate = args.accumulate if training else 1
        self.steps = self.steps_from(0)
        if self.steps == 0:
            raise UserError("{} has {} images, fewer than two a rank".format(images.folder, len(images)))
        self.order_facts = {"seed": args.seed, "repeats": repeats, "images": len(images), "pixels": images.pixels}
        self.order_facts["names_crc32"] = zlib.crc32(images.names.tobytes())
        if any(facts != self.order_facts for facts in card.ranks.all_gather(self.order_facts)):
            raise UserError("{}: the nodes have other images, or another --seed or --repeats".format(images.folder))
        self.wait_seconds = 0.0  # for workers
        self.bad = {}  # {index: reason} of unreadable images of all ranks: by the run in training, else by this epoch
        self.new_bad, self._named_bad = [], set()  # [index, reason] that the other ranks do not know; indices
        share = args.max_bad_images if training else 0
        self._allowed = min(max(int(share > 0), int(share * len(images) + 1e-9)), len(images) - 1)
        # A rank on a CPU has cores of its own. On a card the ranks share them, and none is left idle.
        cores = len(os.sched_getaffinity(0)) if card.type == "cpu" else -(-card.cores // card.ranks.local_world_size)
        count = min(cores if args.workers is None else args.workers, -(-len(images) // self._world))
        self._workers = Workers(self._write, count, (self._batch_size, transform.size, transform.size, 3), card.ranks)
        # One factor for each number of a row of pixels: processors multiply rows, not three channels, at full speed.
        scale = 1 / (255 * torch.tensor(std))
        shift = -torch.tensor(mean) * 255 * scale
        self._scale, self._shift = (values.repeat(transform.size).to(card.torch_device) for values in (scale, shift))
        args.notices += images.notices
        packed = not training and images.pixels.startswith("shorter side")
        if packed and "side {resize} at most, {interpolation}, ".format(**vars(transform)) not in images.pixels:
            text = "[Warning] {} is a pack of {}: --size {} --interpolation {} has the folder's Acc@1"
            args.notices.append(text.format(images.folder, images.pixels, transform.resize, transform.interpolation))

    def __len__(self):
        return len(self.images)

    def steps_from(self, start):
        """Return how many steps an epoch has from sample `start` on; the last one may be smaller."""
        return -(-self._batches_from(start) // self._accumulate)

    def _batches_from(self, start):
        # In training the last one is left out when a rank would get fewer than 2 images, which BatchNorm cannot take.
        whole, rest = divmod(len(self) - start, self._batch_size * self._world)
        return whole + (rest > 0 if not self.training else rest >= 2 * self._world)

    def batches(self, epoch=0, start=0):
        """Yield each `Batch` of `epoch` from sample `start` of its order on; in training seed all draws before it.

        Raises UserError where no image can be read, or a worker was killed; Stopped where a signal ends the wait.
        """
        total = self._batch_size * self._world
        firsts = range(start, len(self), total)[: self._batches_from(start)]
        places = [range(first, min(first + total, len(self))) for first in firsts]  # of all ranks
        own = [positions[self._ranks.rank :: self._world] for positions in places]
        taken = self._take(epoch, own)
        following = next(taken, None)
        for number, positions in enumerate(places):
            part = number % self._accumulate
            step = places[number - part : number - part + self._accumulate]
            images, targets = following()
            following = next(taken, None)  # so that it is copied while the device does this step
            if self.training:
                seed_everything(self._seed, epoch, positions[0], self._ranks.rank + 1)
            weight = len(own[number]) * self._world / sum(map(len, step))
            progress = epoch + step[0][0] / len(self)
            yield Batch(images, targets, weight, progress, positions[-1] + 1, positions is step[-1])

    def _take(self, epoch, own):
        """Yield for each of `own`, positions in the epoch, a function that returns (images, targets) on the device."""
        if self.training:
            order = epoch_order(len(self), self._seed, epoch, self._repeats)
        else:
            order, self.bad = np.arange(len(self)), {}
        # Copies of an image stand apart in a batch, for MixUp and CutMix take neighbours.
        pairs = (sorted(zip(part, order[part].tolist()), key=lambda pair: pair[0] % self._repeats) for part in own)
        crops = self._workers.batches((epoch, items) for items in pairs)
        for _ in own:
            began = time.perf_counter()
            pixels, results = next(crops)
            self.wait_seconds += time.perf_counter() - began
            targets = [target for target, _ in results]
            self.new_bad += itertools.chain(*(bad for _, bad in results))
            if not self.training:
                targets += [PADDING] * (self._batch_size - len(targets))
            elif UNREADABLE in targets:
                self._add_bad(self.new_bad)
            yield functools.partial(self._normalise, self._card.upload(pixels[: len(targets)], torch.tensor(targets)))

    def _write(self, rows, epoch, items):
        """Write images into uint8 `rows` for `items`, [(position, index)]; return [(target, bad)] for them.

        `bad` is a list of [index, reason] of the images in whose place another was taken.
        """
        results = []
        for out, (position, index) in zip(rows, items):
            if self.training:
                seed_everything(self._seed, epoch, position)
            target, bad = UNREADABLE, []
            for candidate in range(index, index + self._allowed + 1):  # with more bad ones the run ends
                candidate %= len(self)
                try:
                    self._transform(self.images.image(candidate), out)
                    target = int(self.images.targets[candidate])
                    break
                except Exception as error:  # decoders raise anything; what it was is reported
                    bad.append([candidate, reason_of(error)])
            results.append((target, bad))
            if self.training and target == UNREADABLE:
                break
        return results

    def _normalise(self, receive):
        """Return (images, targets): the uint8 pixels [B, S, S, 3] that `receive()` returns as float32 [B, 3, S, S]."""
        pixels, targets = receive()
        rows = pixels.flatten(2).to(torch.float32)
        images = torch.addcmul(self._shift, rows, self._scale, out=rows).view(pixels.shape).permute(0, 3, 1, 2)
        return images if self._card.channels_last else images.contiguous(), targets

    def share_bad(self):
        """Gather all ranks' bad images; return a line for each new one, or raise UserError where they are too many."""
        new = dict(itertools.chain(*self._ranks.all_gather(self.new_bad)))
        self._add_bad(new)
        unnamed = sorted(set(new) - self._named_bad)
        self._named_bad.update(new)
        self.new_bad = []
        return ["{} cannot be read: {}".format(printable(self.images.path(index)), new[index]) for index in unnamed]

    def _add_bad(self, new):
        self.bad.update(new)
        if self.training and len(self.bad) > self._allowed:
            bad = ["{} ({})".format(self.images.path(index), reason) for index, reason in sorted(self.bad.items())[:10]]
            text = "{} of {} images of {} cannot be read; --max-bad-images allows {}: {}"
            raise UserError(text.format(len(self.bad), len(self), self.images.folder, self._allowed, "; ".join(bad)))


class SyntheticLoader(Loader):
    """One batch of random images and targets, held on the device, again and again; an epoch has ImageNet's length."""

    training, wait_seconds, new_bad = True, 0.0, ()

    def __init__(self, card, size, num_classes, args):
        self._ranks, self._world = card.ranks, card.ranks.world_size
        self._seed, self._batch_size, self._accumulate = args.seed, args.batch_size, args.accumulate
        generator = torch.Generator().manual_seed(args.seed + card.ranks.rank)
        self._images = card.prepare(torch.randn(args.batch_size, 3, size, size, generator=generator))
        self._targets = torch.randint(num_classes, (args.batch_size,), generator=generator).to(card.torch_device)
        total = args.batch_size * self._world * args.accumulate
        self.images = range(max(total, 1281167 // total * total))
        self.steps = self.steps_from(0)
        self.order_facts = {"seed": args.seed, "repeats": 1, "images": 0, "names_crc32": 0}

    def _take(self, epoch, own):
        return itertools.repeat(lambda: (self._images.clone(), self._targets))  # a step may change them in place
