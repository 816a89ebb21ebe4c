"""From the bytes of image files to batches of uint8 crops: decode, crop, resize, flip, in worker processes."""

import concurrent.futures
import io
import itertools
import math
import mmap
import multiprocessing
import random
import re
import signal
import struct
import warnings
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from PIL import Image

import common
from common.device import keep_freed_memory, seed_everything
from common.distributed import STOP_SIGNALS, end_with_parent
from common.errors import Stopped, UserError, printable

common.require("simplejpeg")
import simplejpeg  # noqa: E402

# PIL warns of odd files (palettes, EXIF, sizes) that it reads all the same, once per worker and without their names.
warnings.filterwarnings("ignore", module=r"PIL\.")
UNREADABLE = -2  # target of an image that cannot be read


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
    return torchvision


class EncodedImage:
    """An image file, whose height and width in pixels are known before it is decoded.

    JPEG is decoded by simplejpeg, everything else by PIL, which also has the last word on damaged files: the pixels and
    the exceptions are PIL's.
    """

    def __init__(self, data):
        self._data, self._height_at = data, _find_jpeg_height(data)
        if self._height_at is None:
            self.width, self.height = Image.open(io.BytesIO(data)).size
        else:
            self.height, self.width = struct.unpack_from(">HH", data, self._height_at)

    def pixels(self, box=None):
        """Return uint8 RGB pixels [height, width, 3] of `box` (top, left, height, width), or of all, as numpy."""
        top, left, height, width = box or (0, 0, self.height, self.width)
        # Two rows more than are needed give the last one its chroma context.
        rows = self._first_rows_of_jpeg(min(self.height, top + height + 2))
        if rows is None:
            rows = np.array(Image.open(io.BytesIO(self._data)).convert("RGB"))
        return rows[top : top + height, left : left + width]

    def _first_rows_of_jpeg(self, height):
        """Return the first `height` rows; None where the file is damaged, or no JPEG.

        What lies below a crop would be a third of the work. libjpeg stops after the rows that the header promises, so a
        smaller height is written there. It then warns of the rest of the file, so that only a whole one is `strict`.
        """
        if self._height_at is None:
            return None
        data, is_whole = bytearray(self._data), height == self.height
        struct.pack_into(">H", data, self._height_at, height)
        pixels = np.empty((height, self.width, 3), dtype=np.uint8)
        pixels[-1] = 0  # and stays so where the decoder gives up
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=pixels, strict=is_whole)
        except ValueError:
            return None
        return pixels if is_whole or (pixels.shape[1] == self.width and pixels[-1].any()) else None


def _find_jpeg_height(data):
    """Return where `data` says its height, if it is a complete JPEG file of a usual kind and size; else None."""
    if data[:2] != b"\xff\xd8" or data.rstrip(b"\0")[-2:] != b"\xff\xd9":
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colors not in ("Gray", "YCbCr", "RGB") or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    # A baseline, extended or progressive frame of 8-bit samples. A thumbnail before it has another size.
    frame = re.search(rb"\xff[\xc0-\xc2]..\x08" + re.escape(struct.pack(">HH", height, width)), data, re.DOTALL)
    return frame.end() - 4 if frame else None


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

    The box has a share in `scale` of the image's area and a width / height in `ratio`, drawn as torchvision does
    (Szegedy et al., 2014), by Python's `random`. The interpolation "random" is "bilinear" or "bicubic" each time.
    `augment` is a function from a PIL image to one of the same size; it may use numpy's and torch's generators too.
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
        height, width = (self.resize * side // shorter for side in (image.height, image.width))
        result = resize(image.pixels(), height, width, self.interpolation)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        out.copy_(result[top : top + self.size, left : left + self.size])


def reason_of(error):
    """Return why an image cannot be read, on one line."""
    return printable(re.sub(r"\s*<_io\.BytesIO object[^>]*>", "", "{}: {}".format(type(error).__name__, error)))


class Workers:
    """`count` processes that write crops into batches in shared memory; with none of them this process does.

    For an image that cannot be read one of the next `tries` - 1 is taken. An evaluation draws nothing: its `seed` is
    None.
    """

    def __init__(self, images, transform, batch_size, count, seed, tries, ranks):
        """Set up the memory and start the processes. Raises UserError without enough memory."""
        self._images, self._transform, self._count, self._seed, self._tries = images, transform, count, seed, tries
        self._ranks, self._pending = ranks, []
        shape = (2 * count + 1, batch_size, transform.size, transform.size, 3)
        size = int(np.prod(shape))
        with open("/proc/meminfo") as file:
            free = 1024 * int(re.search(r"MemAvailable: *(\d+)", file.read()).group(1))
        if size * ranks.local_world_size > free:
            text = "batches in memory need {:.0f} MB, {:.0f} MB are free: fewer --workers, or a smaller --batch-size"
            raise UserError(text.format(size * ranks.local_world_size / 1e6, free / 1e6))
        # Memory that a fork shares is not limited by the size of /dev/shm.
        self._pixels = torch.from_numpy(np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)).view(shape)
        if count:
            context = multiprocessing.get_context("fork")
            self._pool = concurrent.futures.ProcessPoolExecutor(count, context, _start, (self,))
            # All fork now: later a thread of torch's may hold a lock, for which the fork would wait for ever.
            self._pool.submit(int)

    def batches(self, requests):
        """Write a batch for each (epoch, positions in its order, indices of images) of `requests`, some in advance.

        Yields the pixels, uint8 [B, S, S, 3], to be used before the next; the targets, a list; and [index, reason] of
        each bad image. Raises UserError where a process was killed, Stopped where a signal ends the wait.
        """
        concurrent.futures.wait(self._pending)  # of an epoch that was left early: they write into the same memory
        self._pending, waiting = [], enumerate(requests)
        for pixels in itertools.cycle(self._pixels):
            for number, request in itertools.islice(waiting, max(1, 2 * self._count) - len(self._pending)):
                self._pending.append(self._submit(number % len(self._pixels), *request))
            if not self._pending:
                return
            targets, bad = self._result(self._pending.pop(0))
            yield pixels, targets, bad

    def _submit(self, *request):
        if self._count == 0:
            future = concurrent.futures.Future()
            future.set_result(self.write(*request))
            return future
        return self._pool.submit(_write, *request)

    def _result(self, future):
        while not concurrent.futures.wait([future], 0.2).done:
            if self._ranks.stop_signal and not concurrent.futures.wait([future], 1).done:
                raise Stopped(self._ranks.stop_signal)
        try:
            return future.result()
        except BrokenProcessPool:
            text = "a decoding process was killed (out of memory? see dmesg): fewer --workers or a smaller --batch-size"
            raise UserError(text) from None

    def write(self, slot, epoch, positions, indices):
        """Write the images `indices` into batch `slot`; return their targets, and [index, reason] of each bad image."""
        targets, bad = [], []
        for out, position, index in zip(self._pixels[slot], positions, indices):
            if self._seed is not None:
                seed_everything(self._seed, epoch, position)
            targets.append(self._load(index, out, bad))
            if targets[-1] == UNREADABLE and self._seed is not None:
                break  # the run ends
        return targets, bad

    def _load(self, index, out, bad):
        """Write image `index`, or the next that can be read, into `out`; return its target or `UNREADABLE`."""
        for candidate in range(index, index + self._tries):
            candidate %= len(self._images)
            try:
                self._transform(EncodedImage(self._images.read(candidate)), out)
                return int(self._images.targets[candidate])
            except Exception as error:  # decoders raise anything; what it was is reported
                bad.append([candidate, reason_of(error)])
        return UNREADABLE


_workers = None  # in a worker process: the `Workers` that it was forked from


def _start(workers):
    global _workers
    _workers = workers
    end_with_parent()
    for signum in STOP_SIGNALS:  # the rank decides when to end, and ends its workers
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()


def _write(*request):
    return _workers.write(*request)
