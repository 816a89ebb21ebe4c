"""The images of a data set: DIR/train and DIR/val, with one sub-folder per class, in torchvision's order."""

import os
import stat

import numpy as np

from common.errors import UserError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def _class_names(folder):
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError("{}: {}".format(folder, error.strerror)) from None


class ImageFolder:
    """The images of DIR/train or DIR/val, one sub-folder per class, in torchvision's order.

    Attributes:
        classes: sorted list of the class names of train/, also for val/.
        targets: numpy int64 [n].
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
        self.folder = os.path.join(root, split)
        check_folder(root, split)
        found = _class_names(self.folder)
        self.classes = classes or (_class_names(os.path.join(root, "train")) if split != "train" else found)
        known = {name: target for target, name in enumerate(self.classes)}
        unknown = [name for name in found if name not in known]
        if unknown:
            raise UserError(
                "{} has {} class folders that train/ does not know: {}".format(
                    self.folder, len(unknown), printable(", ".join(unknown[:5]))
                )
            )
        paths, targets = [], []
        for name in found:
            for folder, _, files in sorted(os.walk(os.path.join(self.folder, name), followlinks=True)):
                inside = os.path.relpath(folder, self.folder)
                chosen = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
                paths += [os.fsencode(os.path.join(inside, file)) for file in chosen]
                targets += [known[name]] * len(chosen)
        if not paths:
            raise UserError("{} has no images ({})".format(self.folder, " ".join(EXTENSIONS)))
        # A list of a million strings would be copied into every worker, page by page, as its counts are touched.
        self._paths = np.frombuffer(b"".join(paths), dtype=np.uint8)
        self._ends = np.cumsum([len(path) for path in paths])
        self.targets = np.array(targets, dtype=np.int64)

    def __len__(self):
        return len(self.targets)

    def path(self, index):
        """Return the path of image `index`."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.folder, os.fsdecode(self._paths[start : self._ends[index]].tobytes()))

    def read(self, index):
        """Return the bytes of image `index`.

        Raises:
            OSError: it cannot be read, or is no ordinary file.
        """
        with open(self.path(index), "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("not an ordinary file")
            return file.read()


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
        if not _class_names(folder):
            raise UserError("{} has no class folders (one sub-folder of images per class)".format(folder))
