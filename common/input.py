"""Feeding the device: options, the order of samples, batches on the device.

The device takes uint8 pixels and normalises them. The order of samples and every random draw are functions of (seed,
epoch, position), never of workers or ranks.
"""

import itertools
import os
import time

import numpy as np
import torch

from common import errors, workers
from common.checkpoint import AUTO
from common.errors import UserError, printable
from common.folder import ImageFolder as ImageFolder  # the bundles take it from here
from common.folder import check_folder, has_split


def import_torchvision():
    """Return torchvision, also where its wheel was built for CUDA and torch was not.

    Such a wheel cannot load its compiled operators, and its import stops at the first one that is not declared. Our
    transforms use none of them, so declaring their signatures is enough.
    """
    try:
        import torchvision
    except RuntimeError:
        schemas = import_torchvision.schemas = torch.library.Library("torchvision", "FRAGMENT")
        schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def import_torchvision_transforms():
    """Return `torchvision.transforms`."""
    import_torchvision()
    from torchvision import transforms

    return transforms


def add_arguments(parser):
    """Declare the options of data and of loading it."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", "--data-path", "--data_path", metavar="DIR", help="folder with train/ and val/")
    group.add_argument("--synthetic", action="store_true", help="random images held in memory instead of --data")
    group.add_argument("-j", "--workers", type=int, metavar="N", help="decoding processes per rank (default: cores)")
    group.add_argument("--num-classes", type=int, metavar="N", help="default: the folders of train/; 1000 without")
    group.add_argument("--max-bad-images", type=float, default=0.001, metavar="SHARE", help="of the set, see README")


def check_arguments(args):
    """Raise UserError where the options of data contradict each other or the folders are not there."""
    if not args.data and not args.synthetic:
        raise UserError("--data DIR is missing (or --synthetic for random images)")
    if args.evaluate and args.resume in (None, AUTO):
        raise UserError("--evaluate needs --resume FILE")
    if args.evaluate and args.synthetic:
        raise UserError("--evaluate needs the images of --data, not --synthetic ones")
    for name in ("resume", "pretrained"):
        path = getattr(args, name)
        if path and not os.path.isfile(path) and (name, path) != ("resume", AUTO):
            raise UserError("--{}: there is no file {}".format(name, path))
    if not args.synthetic:
        check_folder(args.data, *(["val"] if args.evaluate else ["train", "val"] if args.eval_freq else ["train"]))


def classes_of(content, args):
    """Return the class names of a checkpoint where an evaluation has no train/ folder to take them from."""
    if args.evaluate and content and not has_split(args.data, "train"):
        return content.get("classes")
    return None


def class_names(args, loader):
    """Return the names of all classes; numbers stand for those that `--num-classes` has beyond the folders.

    Raises:
        UserError: `--num-classes` is smaller than the number of class folders.
    """
    names = [] if args.synthetic else list(loader.images.classes)
    count = args.num_classes or len(names) or 1000
    if count < len(names):
        raise UserError("--num-classes {} is less than the {} class folders of {}".format(count, len(names), args.data))
    return names + [str(number) for number in range(len(names), count)]


def epoch_order(length, seed, epoch, repeats=1):
    """Return the order of an epoch's samples, numpy int64 [length * repeats]: a permutation, each entry repeated.

    A repeated entry's copies stand side by side, so that they reach different ranks (Hoffer et al., 2019).
    """
    order = np.random.RandomState([seed % 2**32, epoch]).permutation(length)
    return np.repeat(order, repeats)


class _Requests:
    """Sampler: what the workers are asked for; `items` changes with each epoch."""

    items = ()

    def __iter__(self):
        return iter(self.items)


class Loader:
    """Batches of an `ImageFolder` on the device: float32 images [B, 3, S, S] and int64 targets [B].

    In training every rank takes every world_size-th sample of the epoch's order. In evaluation rank r takes the images
    r, r + world_size, ..., each once; the last batch is padded to the common shape with targets `PADDING`.

    Attributes:
        steps: number of batches of an epoch.
        bad: the indices of images that could not be read, of all ranks: by the run in training, else by this epoch.
        unnamed: (path, reason) of those that the log has not named yet.
    """

    def __init__(self, device, images, transform, args, mean, std, training, repeats=1):
        """Set up shared memory; the workers start with the first epoch.

        Args:
            device: the `common.device.Device`.
            images: the `ImageFolder`.
            transform: called as `transform(EncodedImage, out)` with `out` uint8 [S, S, 3].
            args: `batch_size` per rank, `workers`, `seed`, `max_bad_images`.
            mean: of the channels, in units of 1 = white.
            std: likewise.
            training: shuffled and without padding, or in order and padded.
            repeats: how often each image stands in an epoch (repeated augmentation); the epoch keeps its length.

        Raises:
            UserError: fewer images than ranks, or too little shared memory.
        """
        self.device, self.images, self.training, self.repeats = device, images, training, repeats
        self.seed, self.world = args.seed, device.ranks.world_size
        self.batch_size = errors.batch_size = args.batch_size
        self.bad, self.unnamed, self._known_bad = set(), [], set()
        self._budget = args.max_bad_images * len(images)
        self.wait_seconds, self._workers_run = 0.0, False
        self.order = np.arange(len(images))
        if not training:
            self.batch_size = min(self.batch_size, -(-len(images) // self.world))
        self.steps = self.steps_from(0)
        if self.steps == 0:
            raise UserError("{} has {} images: too few for {} ranks".format(images.folder, len(images), self.world))
        processes = default_workers(device) if args.workers is None else args.workers
        self._slots = workers.slots(processes)
        shape = (self._slots, self.batch_size, transform.size, transform.size, 3)
        workers.check_shared_memory(int(np.prod(shape)), processes)
        self._pixels = torch.zeros(shape, dtype=torch.uint8).share_memory_()
        self._targets = torch.zeros(shape[:2], dtype=torch.int64).share_memory_()
        # One factor for each number of a row of pixels: processors multiply rows, not three channels, at full speed.
        scale = 1 / (255 * torch.tensor(std))
        shift = -torch.tensor(mean) * 255 * scale
        self._scale, self._shift = (values.repeat(transform.size).to(device.torch_device) for values in (scale, shift))
        # A CPU has done with a batch when the next is asked for, so that its memory can be used again.
        self._images = torch.empty(self.batch_size, *shape[2:]) if device.torch_device.type == "cpu" else None
        tries = int(self._budget) + 1 if training else 1
        writer = workers.BatchWriter(images, transform, self._pixels, self._targets, self.seed, training, tries)
        self._requests = _Requests()
        self._batches = workers.start(writer, self._requests, processes)

    def __len__(self):
        return len(self.images)

    def steps_from(self, start):
        """Return how many batches an epoch has from sample `start` on.

        The last one is smaller than the others; in training it is left out when a rank would get fewer than 2 images,
        which BatchNorm cannot take.
        """
        left = len(self.images) - start
        whole, rest = divmod(left, self.batch_size * self.world)
        return whole + (rest > 0 if not self.training else rest >= 2 * self.world)

    def _requests_of(self, epoch, start):
        """Yield (slot, epoch, positions, indices) of this rank's batches; positions in the epoch's order, of images."""
        total = self.batch_size * self.world
        for number in range(self.steps_from(start)):
            first = start + number * total
            positions = np.arange(first + self.device.ranks.rank, min(first + total, len(self.images)), self.world)
            yield number % self._slots, epoch, positions, self.order[positions]

    def batches(self, epoch=0, start=0):
        """Yield (images, targets) of `epoch`, beginning at sample `start` of its order.

        On a CPU the images are overwritten by the next batch.

        Raises:
            UserError: more images were bad than `max_bad_images` allows.
        """
        if self.training:
            self.order = epoch_order(len(self.images), self.seed, epoch, self.repeats)[: len(self.images)]
        else:
            self.bad = set()
        self._requests.items = self._requests_of(epoch, start)
        ranks = self.device.ranks
        # A fork is no place to be interrupted, and does not wait; workers that run already are waited for.
        are_running, self._workers_run = self._workers_run, True
        batches = ranks.wait(lambda: iter(self._batches)) if are_running else iter(self._batches)
        for _ in range(self.steps_from(start)):
            started = time.perf_counter()
            slot, count, bad = ranks.wait(lambda: next(batches)) or (0, 0, [])
            self.wait_seconds += time.perf_counter() - started
            if ranks.agree(len(bad)):
                self._note_bad(ranks.gather_on_host(bad))
            rows = count if self.training else self.batch_size
            targets = self.device.upload(self._targets[slot, :rows])
            yield self._normalise(self._pixels[slot, :rows]), targets

    def _normalise(self, pixels):
        if self._images is None:
            images = self.device.upload(pixels).to(torch.float32)
            images.flatten(2).mul_(self._scale).add_(self._shift)
        else:
            images = self._images[: len(pixels)]
            for image, source in zip(images, pixels):  # one at a time stays in the processor's cache
                image.copy_(source).flatten(1).mul_(self._scale).add_(self._shift)
        images = images.permute(0, 3, 1, 2)  # channels_last, which the device keeps where it likes it
        return images if self.device.likes_channels_last else images.contiguous()

    def _note_bad(self, bad_of_ranks):
        for index, reason in sorted(itertools.chain(*bad_of_ranks)):
            self.bad.add(index)
            if index not in self._known_bad:
                self._known_bad.add(index)
                self.unnamed.append((printable(self.images.path(index)), printable(reason)))
        if self.training and len(self.bad) > self._budget:
            listed = "; ".join(printable(self.images.path(index)) for index in sorted(self.bad)[:20])
            raise UserError(
                "{} images of {} cannot be read, more than --max-bad-images {:g} allows: {}".format(
                    len(self.bad), self.images.folder, self._budget, listed
                )
            )


class SyntheticLoader:
    """One batch of random images and targets, held on the device, again and again."""

    def __init__(self, device, size, num_classes, args):
        errors.batch_size, self._ranks = args.batch_size, device.ranks
        generator = torch.Generator().manual_seed(args.seed + device.ranks.rank)
        shape = (args.batch_size, 3, size, size)
        self._images = device.prepare(torch.randn(shape, generator=generator))
        self._targets = torch.randint(num_classes, (args.batch_size,), generator=generator).to(device.torch_device)
        self.training, self.batch_size, self.wait_seconds, self.unnamed = True, args.batch_size, 0.0, []
        self.world = device.ranks.world_size
        self.steps = max(1, 1281167 // (args.batch_size * self.world))  # an epoch of ImageNet

    def __len__(self):
        return self.steps * self.batch_size * self.world

    def steps_from(self, start):
        """Return how many batches an epoch has from sample `start` on."""
        return self.steps - start // (self.batch_size * self.world)

    def batches(self, epoch=0, start=0):
        """Yield the same (images, targets) as often as an epoch has steps."""
        for _ in range(self.steps_from(start)):
            self._ranks.agree()
            yield self._images, self._targets


def default_workers(device):
    """Return how many decoding processes a rank gets when nobody says: its share of the cores, 16 at the most."""
    return max(1, min(16, (os.cpu_count() or 1) // device.ranks.local_world_size))
