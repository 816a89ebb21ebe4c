"""From the bytes of image files to batches of uint8 crops: decode, crop, resize, flip, in worker processes."""

import atexit
import collections
import contextlib
import importlib
import io
import itertools
import math
import mmap
import multiprocessing
import os
import random
import re
import signal
import struct
import sys
import warnings

import numpy as np
import torch
from PIL import Image

import common
from common.device import keep_freed_memory
from common.distributed import STOP_SIGNALS, end_with_parent
from common.errors import Stopped, UserError, printable

common.require("simplejpeg")
import simplejpeg  # noqa: E402

BATCH_BYTES = 2**29  # that batches take at most, unless these are less than two: 1 GiB for train/ and val/ of a rank
# PIL warns of odd files (palettes, EXIF, sizes) that it reads all the same, once per worker and without their names.
warnings.filterwarnings("ignore", module=r"PIL\.")


def import_torchvision():
    """Return torchvision, also where its wheel was built for CUDA and torch was not: without compiled operators."""
    common.require("torchvision")
    try:
        import torchvision
    except RuntimeError:  # the import stops at the first operator that is not declared
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    except ImportError:  # 0.2, the only wheel for torch 1.5 on aarch64: it wants Pillow 6, and cannot erase
        sys.exit("[Error] this torchvision is too old for this bundle: build torchvision 0.6.0 from its source")
    return torchvision


def from_torchvision(name, option=None):
    """Return `name` of torchvision's transforms, or of their v2; raise UserError for `option` without it."""
    import_torchvision()
    for module in ("torchvision.transforms", "torchvision.transforms.v2"):
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise UserError("{}: this torchvision has no {}, install a newer one".format(option, name))


class EncodedImage:
    """An image file, whose height and width in pixels are known before it is decoded.

    simplejpeg decodes JPEG, PIL everything else and what is damaged: the pixels and the exceptions are PIL's.
    """

    def __init__(self, data):
        self._data, self._frame = data, None
        if data[:2] == b"\xff\xd8" and data.rstrip(b"\0")[-2:] == b"\xff\xd9":  # a complete JPEG file
            with contextlib.suppress(ValueError):
                self.height, self.width, colors, _ = simplejpeg.decode_jpeg_header(data)
                if colors in ("Gray", "YCbCr", "RGB") and self.height * self.width <= Image.MAX_IMAGE_PIXELS:
                    # A frame of 8-bit samples, not arithmetically coded. A thumbnail before it has another size.
                    size = re.escape(struct.pack(">HH", self.height, self.width))
                    self._frame = re.search(rb"\xff[\xc0-\xc2]..\x08" + size, data, re.DOTALL)
        if self._frame is None:
            self.width, self.height = Image.open(io.BytesIO(data)).size

    def pixels(self, box=None):
        """Return uint8 RGB pixels [height, width, 3] of `box` (top, left, height, width), or of all, as numpy."""
        top, left, height, width = box or (0, 0, self.height, self.width)
        rows = self._first_rows(top + height) if self._frame else None
        if rows is None:
            rows = np.array(Image.open(io.BytesIO(self._data)).convert("RGB"))
        return rows[top : top + height, left : left + width]

    def _first_rows(self, count):
        """Return the first `count` rows of a JPEG file, and perhaps more; None where it is damaged.

        The others would be a third of the work. libjpeg stops after the rows that the header promises, so a smaller
        height is written there. It then warns of the rest of the file: only a whole one is decoded with `strict`.
        """
        height = min(self.height, count + 2)  # two more give the last row its chroma context
        data, is_whole = bytearray(self._data), height == self.height
        struct.pack_into(">H", data, self._frame.end() - 4, height)
        pixels = np.empty((height, self.width, 3), dtype=np.uint8)
        pixels[-1] = 0  # and stays so where the decoder gives up
        with contextlib.suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=pixels, strict=is_whole)
            if is_whole or (pixels.shape[1] == self.width and pixels[-1].any()):
                return pixels
        return None


def resize(pixels, height, width, interpolation):
    """Return `pixels`, uint8 [H, W, 3] as numpy, resized with antialiasing to a uint8 tensor [height, width, 3].

    "bilinear" `interpolation` differs from PIL's by at most one level, "bicubic" by two.
    """
    try:
        # A slice costs torch 2.5 times as long as its copy.
        batch = torch.from_numpy(np.ascontiguousarray(pixels)).unsqueeze(0).permute(0, 3, 1, 2)
        result = torch.nn.functional.interpolate(batch, size=(height, width), mode=interpolation, antialias=True)
        return result[0].permute(1, 2, 0)
    except (TypeError, RuntimeError):  # before torch 2.1: not for uint8
        image = Image.fromarray(pixels).resize((width, height), getattr(Image, interpolation.upper()))
        return torch.from_numpy(np.array(image))


class RandomResizedCrop:
    """Training transform: a random box of the image, resized to `size` x `size` pixels, perhaps flipped and augmented.

    It is drawn as torchvision's: `scale` is of the share of the area, `ratio` of width / height. The interpolation
    "random" is "bilinear" or "bicubic" each time. `augment` takes and returns a PIL image.
    """

    def __init__(self, size, interpolation="bilinear", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, augment=None):
        self.size, self.scale, self.ratio, self.flip, self.augment = size, scale, ratio, flip, augment
        self.interpolations = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)

    def box(self, height, width):
        """Draw (top, left, height, width) of a box in an image of `height` x `width` pixels."""
        for _ in range(10):
            area = height * width * random.uniform(*self.scale)
            ratio = math.exp(random.uniform(*map(math.log, self.ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
        w = round(min(width, height * self.ratio[1])) or 1
        h = round(min(height, width / self.ratio[0])) or 1
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image, out):
        """Write the transformed `image` (an `EncodedImage`) into `out`, a uint8 tensor [size, size, 3]."""
        box, flip = self.box(image.height, image.width), random.random() < self.flip
        result = resize(image.pixels(box), self.size, self.size, random.choice(self.interpolations))
        if flip:
            result = result.flip(1)
        if self.augment is not None:
            result = torch.from_numpy(np.array(self.augment(Image.fromarray(result.numpy()))))
        out.copy_(result)


class CenterCrop:
    """Evaluation transform: the shorter side resized to `resize` pixels, then the central square of `size` pixels."""

    def __init__(self, size, resize, interpolation="bilinear"):
        self.size, self.resize, self.interpolation = size, resize, interpolation

    def __call__(self, image, out):
        """Write the transformed `image` (an `EncodedImage`) into `out`, a uint8 tensor [size, size, 3]."""
        shorter = min(image.height, image.width)
        # Of 1 x 60000 pixels the middle is enough: resized, all of them would take gigabytes.
        height, width = (side - max(0, side - 100 * shorter) // 2 * 2 for side in (image.height, image.width))
        pixels = image.pixels(((image.height - height) // 2, (image.width - width) // 2, height, width))
        height, width = (self.resize * side // shorter for side in (height, width))
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        result = resize(pixels, height, width, self.interpolation)
        return out.copy_(result[top : top + self.size, left : left + self.size])


def reason_of(error):
    """Return why an image cannot be read, on one line."""
    return printable(re.sub(r"\s*<_io\.BytesIO object[^>]*>", "", "{}: {}".format(type(error).__name__, error)))


class Workers:
    """`count` processes that call `write(rows, key, items)` on rows of batches in shared memory; with 0 this one does.

    `write` returns a list of what it did for each of `items`, of which each has a row, numpy's or torch's first axis.
    """

    def __init__(self, write, count, shape, ranks):
        """Set up memory for uint8 batches of `shape`, and start the processes; all ranks call this.

        Raises UserError where the memory of the node is too small for two such loaders of every rank.
        """
        self._write, self._ranks, size, least = write, ranks, int(np.prod(shape, dtype=object)), min(2, count + 1)
        with open("/proc/meminfo") as file:
            free = 1024 * int(re.search(r"MemAvailable: *(\d+)", file.read()).group(1))
        free, loaders = min(ranks.all_gather(free)), 2 * ranks.local_world_size  # train/ and val/ of each rank
        if loaders * least * size > free:
            text = "batches in memory need {:.0f} MB, {:.0f} MB are free: fewer --workers, or a smaller --batch-size"
            raise UserError(text.format(loaders * least * size / 1e6, free / 1e6))
        slots = max(least, min(2 * count + 1, BATCH_BYTES // size, free // loaders // 2 // size))
        # Memory that a fork shares is not limited by the size of /dev/shm, and is taken when it is first written.
        memory = mmap.mmap(-1, slots * size)
        self._batches = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)).view(slots, *shape)
        # Where few batches fit, several processes share one: there are two pieces for each of them.
        self._piece = -(-shape[0] // max(1, -(-2 * count // max(1, slots - 1))))
        # All fork now: later a thread of torch's may hold a lock, for which the fork would wait for ever.
        self._pipes, self._busy = [self._start() for _ in range(count)], collections.deque()

    def _start(self):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=self._serve, args=(ours, theirs))
        process.start()
        atexit.register(process.kill)  # it ignores what multiprocessing would send it
        theirs.close()  # so that the pipe ends with the process
        return ours

    def _serve(self, ours, theirs):
        os.environ.setdefault("PARENT_PID", str(os.getppid()))
        end_with_parent()
        for signum in STOP_SIGNALS:  # the rank decides when to end, and ends its workers
            signal.signal(signum, signal.SIG_IGN)
        torch.set_num_threads(1)
        keep_freed_memory()
        ours.close()
        with contextlib.suppress(EOFError, OSError):  # nobody needs the batches any more
            while True:
                slot, first, key, items = theirs.recv()
                try:
                    result = self._write(self._batches[slot][first:], key, items)
                except Exception as error:  # for `_receive`
                    result = error
                theirs.send(result)

    def batches(self, requests):
        """Yield (batch, results) of each (key, items) of `requests`, some of which are worked on in advance.

        The batch is to be used before the next. Raises what `write` raised, UserError where a process was killed,
        Stopped where a signal ends the wait.
        """
        while self._busy:  # with an epoch that was left early: it has the same memory
            self._receive()
        begun, pipes = collections.deque(), itertools.cycle(self._pipes)
        for number, (key, items) in enumerate(requests):
            batch = self._batches[number % len(self._batches)]
            if not self._pipes:
                yield batch, self._write(batch, key, items)
                continue
            if len(begun) == len(self._batches) - 1:
                yield self._finish(*begun.popleft())
            firsts = range(0, len(items), self._piece)
            begun.append((batch, len(firsts)))
            for first, pipe in zip(firsts, pipes):
                self._busy.append(pipe)
                with contextlib.suppress(OSError):  # where the process was killed, its piece will be missed
                    pipe.send((number % len(self._batches), first, key, items[first : first + self._piece]))
        while begun:
            yield self._finish(*begun.popleft())

    def _finish(self, batch, pieces):
        return batch, [result for _ in range(pieces) for result in self._receive()]

    def _receive(self):
        pipe = self._busy.popleft()
        try:
            while not pipe.poll(0.2):
                # Other ranks may have their batch: if this one leaves them, what they do now is lost.
                if self._ranks.stop_signal and not pipe.poll(1 if self._ranks.world_size == 1 else 10):
                    raise Stopped(self._ranks.stop_signal)
            result = pipe.recv()
        except (EOFError, OSError):
            text = "a decoding process was killed (out of memory? see dmesg): fewer --workers or a smaller --batch-size"
            raise UserError(text) from None
        if isinstance(result, Exception):
            raise result
        return result
