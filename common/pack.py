"""Pack a data set for faster reading: python -m common.pack SRC DST

DST gets one file of image bytes and one index for train/ and for val/, in place of a file per image, and takes the
place of SRC as --data. Images whose shorter side is longer than --size are made that small, and saved as JPEG, which
is what makes them faster to decode: 256 suits crops of 224 pixels, 378 those of 331; --size 0 keeps every byte.
Whatever cannot be decoded is kept as it is: training then names it as it does in SRC. DST appears when it is complete;
what an interrupted run left is DST.part.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import sys

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import data, errors
from common.arguments import OptionType, positive_int, whole_number
from common.checkpoint import write_atomic
from common.errors import UserError, printable
from common.transforms import EncodedImage, reason_of, resize

quality = OptionType("a whole number from 1 to 100", int, lambda value: 1 <= value <= 100)


class Pack:
    """The packed `folder`: its `classes`, and the `names` of the images (numpy bytes [n]), as CLASS/.../FILE."""

    def __init__(self, folder):
        """Read the index; raises UserError where it is damaged, or is not that of the file of images."""
        try:
            with np.load(folder + ".index.npz", allow_pickle=False) as index:
                self.classes = [os.fsdecode(name) for name in index["classes"].tolist()]
                self.names, self._ends = index["names"], index["ends"]
            self._file = open(folder + ".pack", "rb", buffering=0)
            size, expected = os.path.getsize(folder + ".pack"), int(self._ends[-1])
        except Exception as error:  # zipfile and numpy raise anything
            raise UserError("{}.index.npz cannot be read: {}: pack the data set again".format(folder, error)) from None
        if size != expected:
            raise UserError("{}.pack has {} bytes, its index says {}: copy it again".format(folder, size, expected))

    def read(self, index):
        """Return the bytes of image `index`."""
        start, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        return os.pread(self._file.fileno(), end - start, start)  # no position, which processes would share


def shrink(encoded, size, quality):
    """Return the image file `encoded` (bytes) with a shorter side of `size` pixels, or as it is if that is shorter."""
    image = EncodedImage(encoded)
    shorter, pixels = min(image.height, image.width), image.pixels()
    if shorter <= size:
        return encoded
    height, width = (round(side * size / shorter) for side in (image.height, image.width))
    file = io.BytesIO()
    Image.fromarray(resize(pixels, height, width, "bicubic").numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


_images, _args = None, None  # of the split that is being packed, for the processes that are forked for it


def _convert(number):
    """Return (bytes of image `number`, why it cannot be decoded or None)."""
    encoded = b""
    try:
        encoded = _images.read(number)
        return shrink(encoded, _args.size, _args.quality) if _args.size else encoded, None
    except Exception as error:  # decoders raise anything
        return encoded, reason_of(error)


def pack_split(source, target, split, args):
    """Write `target`/`split`.pack and its index from `source`/`split`; return how many images are bad."""
    global _images, _args
    images, path = data.ImageFolder(source, split, data.find_classes(source, split)), os.path.join(target, split)
    _images, _args, bad, lengths = images, args, 0, []
    pool = multiprocessing.get_context("fork").Pool(args.workers, torch.set_num_threads, (1,))
    with pool, open(path + ".pack", "xb") as file:
        results = tqdm(pool.imap(_convert, range(len(images)), chunksize=16), split, len(images), unit=" images")
        for number, (encoded, error) in enumerate(results):
            file.write(encoded)
            lengths.append(len(encoded))
            if error is not None:
                bad += 1
                tqdm.write("[Warning] {}: {}; kept as it is".format(printable(images.path(number)), error))
        file.flush()
        os.fsync(file.fileno())
    classes, index = np.array([os.fsencode(name) for name in images.classes]), io.BytesIO()
    np.savez(index, classes=classes, names=images.names, ends=np.cumsum(lengths))
    write_atomic(path + ".index.npz", index.getvalue())
    return bad


def main(argv=None):
    """Pack what the command line says; return the exit status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m common.pack", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("source", metavar="SRC", help="folder with train/ or val/ or both")
    add("target", metavar="DST", help="new folder")
    add("--size", type=whole_number, default=256, metavar="PIXELS", help="of the shorter side (default: 256)")
    add("--quality", type=quality, default=90, metavar="Q", help="of the JPEG files (default: 90)")
    add("--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="(default: cores)")
    args = parser.parse_args(argv)
    splits = [split for split in ("train", "val") if data.has_split(args.source, split)]
    if not splits:
        raise UserError("{} has neither a train/ nor a val/ folder".format(args.source))
    target = args.target.rstrip(os.sep)
    if os.path.lexists(target):
        raise UserError("{} exists already: give the name of a new folder".format(target))
    shutil.rmtree(target + ".part", ignore_errors=True)
    os.makedirs(target + ".part")
    bad = sum([pack_split(args.source, target + ".part", split, args) for split in splits])
    os.replace(target + ".part", target)
    print("{} is complete{}".format(target, "; {} images cannot be decoded".format(bad) if bad else ""))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
