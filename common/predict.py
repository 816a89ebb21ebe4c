"""Name what images show: the likeliest classes on the screen, in a CSV for a folder, and on a contact sheet."""

import csv
import io
import os
import re

import torch

from common import contact_sheet
from common.deploy import save
from common.errors import UserError, printable
from common.folder import Images
from common.input import import_torchvision
from common.scan import image_names, join

BEST = 5
CSV = "predictions.csv"


def find_images(path):
    """Return the `Images` that `path` is or holds, sub-folders included; their targets are their own numbers.

    Raises:
        UserError: there are none.
    """
    if os.path.isdir(path):
        names = image_names(path)
    elif os.path.isfile(path):
        path, names = os.path.dirname(path), [os.path.basename(path)]
    else:
        raise UserError("--predict: there is no {}".format(path))
    if not names:
        raise UserError("--predict: {} has no images".format(path))
    return Images(path, join(names), range(len(names)))


def run(args, loader, model, classes, log):
    """Write the `BEST` likeliest classes of each image.

    Args:
        args: `predict`, `sheet`, `output_dir`.
        loader: the `input.Loader` of what `find_images` returned.
        model: the model on the loader's device, in evaluation mode.
        classes: their names.
        log: the `common.logger.Log`.

    Raises:
        UserError: no image could be read, or a file cannot be written.
    """
    images, names, best = loader.images, _with_words(classes), [[] for _ in range(len(loader))]
    with torch.no_grad():
        for batch, numbers in loader.batches():
            probabilities, indices = model(batch).float().softmax(dim=1).topk(min(BEST, len(names)))
            rows = zip(numbers.tolist(), probabilities.tolist(), indices.tolist())
            for number, row_probabilities, row_indices in rows:
                if number >= 0:  # neither padding nor unreadable
                    best[number] = [(names[i], p) for i, p in zip(row_indices, row_probabilities)]
    if not any(best):
        raise UserError("{} cannot be read: {}".format(*loader.unnamed[0]))
    for path, reason in loader.unnamed:
        log.line("[Warning] {} cannot be read: {}".format(path, reason))
    folder = args.output_dir or ""
    if os.path.isdir(args.predict):
        path = os.path.join(folder, CSV)
        save(path, _csv(images, best))
        log.line("{} of {} images are in {}".format(sum(map(bool, best)), len(images), path))
    else:
        for name, probability in best[0]:
            log.line("{:6.2f} %  {}".format(100 * probability, name))
    if args.sheet:
        path = os.path.join(folder, args.sheet)
        shown = range(min(len(images), contact_sheet.LIMIT))
        entries = [(images.path(number), printable(images.name(number)), best[number]) for number in shown]
        save(path, contact_sheet.draw(entries))
        log.line("{} images are drawn in {}".format(len(shown), path))


def _csv(images, best):
    """Return the bytes of the table; an image that could not be read has empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image"] + ["{}{}".format(what, i + 1) for i in range(BEST) for what in ("class", "probability")])
    for number, row in enumerate(best):
        cells = [cell for name, probability in row for cell in (name, "{:.6f}".format(probability))]
        writer.writerow([images.name(number)] + cells + [""] * (2 * BEST - len(cells)))
    return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name may be any bytes


def _with_words(classes):
    """Return `classes`, with a word to each where they are the 1000 of ImageNet and torchvision knows the words."""
    if len(classes) != 1000 or not all(re.match(r"n\d{8}$|\d+$", name) for name in classes):
        return classes
    try:
        words = import_torchvision().models.ResNet18_Weights.DEFAULT.meta["categories"]
    except (ImportError, AttributeError):
        return classes
    return ["{} {}".format(name, word) for name, word in zip(classes, words)]
