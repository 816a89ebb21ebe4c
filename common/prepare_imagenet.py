"""Sort ImageNet's validation images, which come in one flat folder, into a sub-folder per class.

    python -m common.prepare_imagenet VAL ILSVRC2012_devkit_t12
    python -m common.prepare_imagenet VAL LOC_val_solution.csv --link OUT

The second argument knows the classes: the folder of the devkit, Kaggle's LOC_val_solution.csv, a text of lines
`<file> <class>`, or one with a class per line in the order of the images. Nothing is moved unless everything is clear;
a run that was interrupted is finished by the next.
"""

import argparse
import os
import re
import sys
import zlib

from common import errors
from common.errors import UserError, printable
from common.scan import EXTENSIONS

SYNSET = re.compile(r"n\d{8}$")
GROUND_TRUTH = os.path.join("data", "ILSVRC2012_validation_ground_truth.txt")
SYNSETS = os.path.join("data", "meta.mat")
KNOWN = {1: "n01751748", 2: "n09193705", 3: "n02105855"}  # labels in another order would be wrong without a word


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError("{}: {}".format(path, error.strerror)) from None


def synsets_of_devkit(path):
    """Return the class names of the devkit's meta.mat: number n of the ground truth is item n - 1.

    The file is MATLAB's version 5: a header of 128 bytes, then a tag of 8 bytes before compressed data. The synsets
    stand in it in the order of their numbers.
    """
    data = _read(path)[128:]
    try:
        data = zlib.decompress(data[8:]) if data[:4] == b"\x0f\0\0\0" else data
    except zlib.error:
        raise UserError("{} is damaged".format(path)) from None
    found = re.findall(rb"n(?:\0?\d){8}", data)  # of one or two bytes a character
    return [name.replace(b"\0", b"").decode() for name in found]


def read_labels(path):
    """Return a function from the name of an image to its class, or None for an image that `path` does not know.

    Raises:
        UserError: the file cannot be read, or is none of the known forms.
    """
    synsets = None
    if os.path.isdir(path):
        path, synsets = os.path.join(path, GROUND_TRUTH), synsets_of_devkit(os.path.join(path, SYNSETS))
    lines = [line.strip() for line in _read(path).decode("utf-8", "replace").splitlines() if line.strip()]
    if lines and all(line.isdigit() for line in lines):
        if synsets is None:
            raise UserError("{} has numbers: name the devkit's folder, whose {} explains them".format(path, SYNSETS))
        if not 1 <= min(map(int, lines)) <= max(map(int, lines)) <= len(synsets):
            raise UserError("{} and {} do not fit each other".format(path, SYNSETS))
        lines = [synsets[int(line) - 1] for line in lines]
    if lines and all(map(SYNSET.match, lines)):
        return lambda name: _in_order(lines, name)
    labels = {}
    for line in lines:
        file, *fields = re.split(r"[,\s]+", line)
        labels.update((os.path.splitext(file)[0], field) for field in fields[:1] if SYNSET.match(field))
    if not labels:
        raise UserError("{} has no lines of the form `<file> <class>` (class: n and 8 digits)".format(path))
    return lambda name: labels.get(os.path.splitext(name)[0])


def _number(name):
    number = re.search(r"_val_(\d{8})\.", name)
    return int(number.group(1)) if number else 0


def _in_order(lines, name):
    return lines[_number(name) - 1] if 1 <= _number(name) <= len(lines) else None


def find_images(folder):
    """Return a dict from image name to the sub-folder it is in ("" for `folder` itself).

    Raises:
        UserError: the folder cannot be read, has no images, or has one twice.
    """
    found = {}
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        for place in [""] + inside:
            for name in os.listdir(os.path.join(folder, place)):
                if name.lower().endswith(EXTENSIONS):
                    if name in found:
                        raise UserError("{} is both in {!r} and in {!r} of {}".format(name, found[name], place, folder))
                    found[name] = place
    except OSError as error:
        raise UserError("{}: {}".format(folder, error.strerror)) from None
    if not found:
        raise UserError("{} has no images".format(folder))
    return found


def plan(folder, label_of):
    """Return a list of (image name, sub-folder it is in, sub-folder of its class) of all images of `folder`.

    Raises:
        UserError: an image has no label, stands in the wrong sub-folder, or the labels are known to be wrong.
    """
    steps = [(name, place, label_of(name)) for name, place in sorted(find_images(folder).items())]
    unknown = [name for name, _, label in steps if label is None]
    if unknown:
        text = "{} of {} images have no class in the list: {}"
        raise UserError(text.format(len(unknown), len(steps), printable(", ".join(unknown[:3]))))
    for name, place, label in steps:
        if place not in ("", label):
            raise UserError("{} stands in {}/ and is of class {}".format(name, place, label))
        if name.startswith("ILSVRC2012_val_") and label != KNOWN.get(_number(name), label):
            raise UserError("{} is {}, not {}: the list is in another order".format(name, KNOWN[_number(name)], label))
    return steps


def main(argv=None):
    """Move or link the images; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("val", metavar="VAL", help="folder of the images")
    parser.add_argument("labels", metavar="LABELS", help="folder of the devkit, or a list")
    parser.add_argument("--link", metavar="OUT", help="leave VAL as it is and fill OUT with symbolic links")
    args = parser.parse_args(argv)
    steps = plan(args.val, read_labels(args.labels))
    target = args.link or args.val
    done = 0
    try:
        for label in sorted({label for _, _, label in steps}):
            os.makedirs(os.path.join(target, label), exist_ok=True)
        for name, place, label in steps:
            source, wanted = os.path.join(args.val, place, name), os.path.join(target, label, name)
            if not os.path.lexists(wanted):
                (os.symlink if args.link else os.rename)(os.path.abspath(source), wanted)
                done += 1
    except OSError as error:
        text = "{}: {}; {} of {} images are done, the same command goes on"
        raise UserError(text.format(error.filename, error.strerror, done, len(steps))) from None
    text = "{} of {} images {}, the others were there; {} class folders in {}"
    how = "linked" if args.link else "moved"
    print(text.format(done, len(steps), how, len({label for _, _, label in steps}), target))


if __name__ == "__main__":
    sys.exit(errors.run(main))
