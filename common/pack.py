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
import time

import numpy as np
import torch
from PIL import Image

from common import errors, files, scan
from common.decode import EncodedImage, resize
from common.errors import UserError, printable
from common.folder import ImageFolder, pack_path

SPLITS = ("train", "val")


def smaller(data, size, quality):
    """Return (bytes, error): the image `data` with a shorter side of `size` pixels, or `data` where it is no longer.

    The error is None, or says why the image cannot be decoded; then the bytes are `data`.
    """
    if not size:
        return data, None
    try:
        image = EncodedImage(data)
        shorter = min(image.height, image.width)
        pixels = image.pixels()
    except Exception as error:  # decoders raise anything
        return data, "{}: {}".format(type(error).__name__, error)
    if shorter <= size:
        return data, None
    height, width = (round(side * size / shorter) for side in (image.height, image.width))
    result = torch.empty(height, width, 3, dtype=torch.uint8)
    resize(pixels, result, "bicubic")
    file = io.BytesIO()
    Image.fromarray(result.numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue(), None


def _start(*job):
    torch.set_num_threads(1)
    _start.job = job


def _convert(number):
    images, size, quality = _start.job
    try:
        return smaller(images.read(number), size, quality)
    except OSError as error:
        return b"", str(error)


def pack_split(source, target, split, args):
    """Write `target`/`split`.pack and its index from `source`/`split`; return how many images are bad."""
    images = ImageFolder(source, split, scan.class_names(os.path.join(source, split)))
    bad, lengths, started = 0, [], time.time()
    told = started
    pool = multiprocessing.get_context("fork").Pool(args.workers, _start, (images, args.size, args.quality))
    with pool, open(pack_path(target, split), "xb") as file:
        for number, (data, error) in enumerate(pool.imap(_convert, range(len(images)), chunksize=16), 1):
            file.write(data)
            lengths.append(len(data))
            if error is not None:
                bad += 1
                print("[Warning] {}: {}; kept as it is".format(printable(images.path(number - 1)), error), flush=True)
            if time.time() - told > 10 or number == len(images):
                told, rate = time.time(), number / (time.time() - started)
                print("{}: {} of {} images, {:.0f}/s".format(split, number, len(images), rate), flush=True)
    files.sync(pack_path(target, split))
    index = io.BytesIO()
    np.savez(index, byte_ends=np.cumsum(np.array(lengths, dtype=np.int64)), **scan.as_arrays(images.index))
    path = pack_path(target, split, ".index.npz")
    os.replace(files.write_beside(path, index.getvalue()), path)
    return bad


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m common.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="folder with train/ or val/ or both")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of the shorter side (default: 256)")
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="of the JPEG files (default: 90)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="(default: cores)")
    args = parser.parse_args(argv)
    splits = [split for split in SPLITS if os.path.isdir(os.path.join(args.source, split))]
    if not splits:
        raise UserError("{} has neither a train/ nor a val/ folder".format(args.source))
    target = args.target.rstrip(os.sep)
    if os.path.lexists(target):
        raise UserError("{} exists already: give the name of a new folder".format(target))
    if args.size < 0 or not 1 <= args.quality <= 100 or args.workers < 1:
        raise UserError("--size is 0 or more, --quality 1 to 100, --workers 1 or more")
    part = target + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    bad = sum([pack_split(args.source, part, split, args) for split in splits])
    os.replace(part, target)
    files.sync(os.path.dirname(os.path.abspath(target)))
    print("{} is complete{}".format(target, "; {} images cannot be decoded".format(bad) if bad else ""))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
