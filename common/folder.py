"""The images of a data set: DIR/train and DIR/val, with one sub-folder per class, in torchvision's order."""

import os
import stat

import numpy as np

from common.errors import UserError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def class_names(folder):
    """Return the sorted names of the sub-folders of `folder`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError("{}: {}".format(folder, error.strerror)) from None


class Images:
    """Images of one folder.

    Attributes:
        folder: that all of them lie in.
        targets: numpy int64 [n].
    """

    def __init__(self, folder, names, targets):
        """Take the `names` of the image files, relative to `folder`, and their `targets`."""
        self.folder, self.targets = folder, np.array(targets, dtype=np.int64)
        names = [os.fsencode(name) for name in names]
        # A list of a million strings would be copied into every worker, page by page, as its counts are touched.
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in names])

    def __len__(self):
        return len(self.targets)

    def name(self, index):
        """Return the name of image `index`, relative to the folder."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._names[start : self._ends[index]].tobytes())

    def path(self, index):
        """Return the path of image `index`."""
        return os.path.join(self.folder, self.name(index))

    def read(self, index):
        """Return the bytes of image `index`.

        Raises:
            OSError: it cannot be read, or is no ordinary file.
        """
        with open(self.path(index), "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("not an ordinary file")
            return file.read()


class ImageFolder(Images):
    """The images of DIR/train or DIR/val, one sub-folder per class, in torchvision's order.

    Attributes:
        classes: sorted list of the class names of train/, also for val/.
    """

    def __init__(self, root, split, classes=None):
        """Scan the folder.

        Args:
            root: the folder that holds train/ and val/.
            split: "train" or "val".
            classes: names that replace those of train/ (an evaluation where only val/ is at hand).

        Raises:
            UserError: a folder is missing or empty, or val/ has a class that train/ does not know.
        """
        folder = os.path.join(root, split)
        check_folder(root, split)
        found = class_names(folder)
        self.classes = classes or (class_names(os.path.join(root, "train")) if split != "train" else found)
        known = {name: target for target, name in enumerate(self.classes)}
        unknown = [name for name in found if name not in known]
        if unknown:
            raise UserError(
                "{} has {} class folders that train/ does not know: {}".format(
                    folder, len(unknown), printable(", ".join(unknown[:5]))
                )
            )
        names, targets = [], []
        for name in found:
            inside = image_names(folder, name)
            names += inside
            targets += [known[name]] * len(inside)
        if not names:
            raise UserError("{} has no images ({})".format(folder, " ".join(EXTENSIONS)))
        super().__init__(folder, names, targets)


def image_names(root, inside=""):
    """Return the sorted names, relative to `root`, of all image files below its sub-folder `inside`."""
    names = []
    for folder, _, files in sorted(os.walk(os.path.join(root, inside), followlinks=True)):
        chosen = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
        place = os.path.normpath(os.path.join(inside, os.path.relpath(folder, os.path.join(root, inside))))
        names += chosen if place == os.curdir else [os.path.join(place, file) for file in chosen]
    return names


def _open_at_once(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe with an image's name would make us wait for its writer


def check_folder(root, *splits):
    """Raise UserError where DIR or one of its `splits` is missing or has no class folders."""
    if not os.path.isdir(root):
        raise UserError("data set {} is not a folder".format(root))
    for split in splits:
        folder = os.path.join(root, split)
        if not os.path.isdir(folder):
            raise UserError("data set {} has no {}/ folder".format(root, split))
        if not class_names(folder):
            raise UserError("{} has no class folders (one sub-folder of images per class)".format(folder))
