"""Pack a data set for faster reading: python -m common.pack SRC DST

DST gets one file of pixels and one index for train/ and for val/, and takes the place of SRC as --data. Images whose
shorter side is longer than --size are made that small, as for the measuring of val/: 256 suits crops of 224 pixels, 378
those of 331; 0 leaves all as they are. They are stored decoded, which is what makes them fast to read; --format jpeg
takes about a sixth of the disk. What cannot be decoded is kept as it is: training then names it as it does in SRC. DST
appears when it is complete; what an interrupted run left is DST.part, which the next one replaces.
"""

import argparse
import errno
import io
import mmap
import multiprocessing
import os
import shutil
import sys
import zlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import data, errors
from common.arguments import OptionType, positive_int, whole_number
from common.distributed import Ranks
from common.errors import UserError, printable
from common.transforms import EncodedImage, Workers, reason_of, resize

quality = OptionType("a whole number from 1 to 100", int, lambda value: 1 <= value <= 100)
HEAD = b"common.pack 2 %08x\n"  # the version, and the checksum of the index
SAMPLE = 500  # images that are converted to learn how many bytes all of them need
PIECE = 16  # images that a process takes at a time


def _read(file, buffer, start):
    if os.preadv(file.fileno(), [buffer], start) != buffer.nbytes:  # processes would share a position
        raise OSError("the pack ends before it")
    return buffer


class RawImage:
    """An image of a pack, uint8 [height, width, 3] from byte `start` of `file` on."""

    def __init__(self, file, start, height, width):
        self._file, self._start, self.height, self.width = file, start, height, width

    def pixels(self, box=None):
        """Return uint8 RGB pixels [height, width, 3] of `box` (top, left, height, width), or of all, as numpy."""
        top, left, height, width = box or (0, 0, self.height, self.width)
        rows = np.empty((height, self.width, 3), dtype=np.uint8)
        return _read(self._file, rows, self._start + 3 * self.width * top)[:, left : left + width]


class Pack:
    """The packed `folder`: its `classes`, and the `names` of the images (numpy bytes [n]), as CLASS/.../FILE.

    It is read, not mapped: a map gives each process page tables for all of it, and a disk that fails kills the process.
    """

    def __init__(self, folder):
        """Read the index; raises UserError where it is damaged, or is not that of the file of pixels."""
        path, index = folder + ".pack", folder + ".index.npz"
        try:
            self._file, size = open(path, "rb", buffering=0), os.path.getsize(path)
            with open(index, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UserError("{}: {}: copy the pack again".format(error.filename, error.strerror)) from None
        head = self._file.read(len(HEAD % 0))
        if not head.startswith(HEAD[:-5]):
            raise UserError("{} is no pack, or of an earlier version: pack the data set again".format(path))
        if head != HEAD % zlib.crc32(content):
            raise UserError("{} is damaged, or not that of {}: copy both again".format(index, path))
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            self.classes = [os.fsdecode(name) for name in arrays["classes"].tolist()]
            self.names, self._places, self.pixels = arrays["names"], arrays["places"], str(arrays["pixels"])
            expected = int(arrays["size"])
        if size != expected:
            raise UserError("{} has {} bytes, its index says {}: copy it again".format(path, size, expected))
        self._checked = mmap.mmap(-1, len(self.names))  # by any of the processes that will share it

    def image(self, index):
        """Return image `index`; raises OSError where it is damaged, which is looked for once, else what PIL raises."""
        start, length, height, width, checksum = self._places[index].tolist()
        if not (height and self._checked[index]):
            content = _read(self._file, np.empty(length, dtype=np.uint8), start)
            if zlib.crc32(content) != checksum:
                raise OSError("the pack is damaged here: copy it again")
            self._checked[index] = 1
        return RawImage(self._file, start, height, width) if height else EncodedImage(content.tobytes())


def convert(images, number, args):
    """Return what the pack stores of image `number`, whether it was made smaller, and why it is kept undecoded or None.

    It is the bytes of a file, or pixels, uint8 [height, width, 3] as numpy.
    """
    encoded, is_smaller = b"", False
    try:
        encoded = images.read(number)
        if args.format == "jpeg" and not args.size:
            return encoded, False, None
        image = EncodedImage(encoded)
        shorter, pixels = min(image.height, image.width), image.pixels()
        is_smaller = 0 < args.size < shorter
        if is_smaller:
            height, width = (args.size * side // shorter for side in (image.height, image.width))
            pixels = resize(pixels, height, width, args.interpolation).numpy()
        if args.format == "raw":
            return np.ascontiguousarray(pixels), is_smaller, None
        if is_smaller:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=args.quality)
            encoded = file.getvalue()
        return encoded, is_smaller, None
    except Exception as error:  # decoders raise anything
        return encoded, False, reason_of(error)


def bytes_needed(images, args):
    """Return how many bytes a pack of `images` takes, from a sample of them."""
    sample = range(0, len(images), -(-len(images) // SAMPLE))
    return sum(memoryview(convert(images, number, args)[0]).nbytes for number in sample) * len(images) // len(sample)


def pack_split(images, path, args):
    """Write `path`.pack, by all processes at once, and its index; say which of `images` cannot be decoded."""
    end = multiprocessing.Value("q", len(HEAD % 0))  # of what is written
    file = open(path + ".pack", "xb", buffering=0)

    def store(_, key, numbers):
        return [append(*convert(images, number, args)) for number in numbers]

    def append(content, is_smaller, problem):
        height, width = content.shape[:2] if isinstance(content, np.ndarray) else (0, 0)
        content = memoryview(content).cast("B")
        with end.get_lock():
            start, end.value = end.value, end.value + len(content)
        if os.pwrite(file.fileno(), content, start) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return (start, len(content), height, width, zlib.crc32(content)), is_smaller, problem

    places, numbers, pixels = np.zeros((len(images), 5), dtype=np.int64), range(len(images)), images.pixels
    workers = Workers(store, args.workers, (PIECE, 1), Ranks())
    pieces = workers.batches((None, numbers[first : first + PIECE]) for first in numbers[::PIECE])
    with tqdm(desc=os.path.basename(path), total=len(images), unit=" images") as bar:
        for first, (_, results) in zip(numbers[::PIECE], pieces):
            for number, (place, is_smaller, problem) in enumerate(results, first):
                places[number] = place
                if is_smaller:
                    pixels = "shorter side {} at most, {}, {}".format(args.size, args.interpolation, args.format)
                if problem:
                    tqdm.write("[Warning] {}: {}; kept as it is".format(printable(images.path(number)), problem))
            bar.update(len(results))
    index, classes = io.BytesIO(), np.array([os.fsencode(name) for name in images.classes])
    np.savez(index, classes=classes, names=images.names, places=places, size=end.value, pixels=pixels)
    with errors.replacing(path + ".index.npz", index.getvalue()):
        pass
    os.pwrite(file.fileno(), HEAD % zlib.crc32(index.getvalue()), 0)
    os.fsync(file.fileno())


def main(argv=None):
    """Pack what the command line says; return the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m common.pack", description=__doc__, formatter_class=form)
    add, cores = parser.add_argument, len(os.sched_getaffinity(0))
    add("source", metavar="SRC", help="folder with train/ or val/ or both")
    add("target", metavar="DST", help="new folder")
    add("--size", type=whole_number, default=256, metavar="PIXELS", help="of the shorter side (default: 256)")
    add("--format", default="raw", choices=["raw", "jpeg"], help="(default: raw)")
    text = "of what is made smaller, as the recipe's of val/ (default: bilinear)"
    add("--interpolation", default="bilinear", choices=["bilinear", "bicubic"], help=text)
    add("--quality", type=quality, default=90, metavar="Q", help="of --format jpeg (default: 90)")
    add("--workers", type=positive_int, default=cores, metavar="N", help="(default: cores)")
    args = parser.parse_args(argv)
    splits = [split for split in ("train", "val") if os.path.isdir(os.path.join(args.source, split))]
    if not splits:
        raise UserError("{} has neither a train/ nor a val/ folder".format(args.source))
    target = os.path.abspath(args.target)  # of "" the folder where the user stands
    if os.path.lexists(target):
        raise UserError("{} exists already: give the name of a new folder".format(target))
    sets = {split: data.ImageFolder(args.source, split, data.find_classes(args.source, split)) for split in splits}
    part = target + ".part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        needed, free = sum(bytes_needed(images, args) for images in sets.values()), shutil.disk_usage(part).free
        print("{} needs about {:,} bytes, {:,} are free".format(target, needed, free), flush=True)
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for split, images in sets.items():
            pack_split(images, os.path.join(part, split), args)
        os.replace(part, target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        cure = ": --format jpeg takes about a sixth" if error.errno == errno.ENOSPC and args.format == "raw" else ""
        raise UserError("{} cannot be written: {}{}".format(target, error.strerror or error, cure)) from None
    print("{} is complete".format(target))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
