"""The images of a data set: DIR/train and DIR/val, with one sub-folder per class, or a packed copy of them."""

import os
import stat

import numpy as np

from common import scan
from common.errors import UserError, printable


def pack_path(root, split, suffix=".pack"):
    """Return the path of one of the two files of a packed DIR/train or DIR/val (see `common.pack`)."""
    return os.path.join(root, split + suffix)


class Images:
    """Images of one folder.

    Attributes:
        folder: that all of them lie in.
        targets: numpy int64 [n].
    """

    def __init__(self, folder, names, targets):
        """Take the names of the image files, relative to `folder`, as `scan.join` returns them, and their `targets`."""
        self.folder, self.targets = folder, np.array(targets, dtype=np.int64)
        self._names, self._ends = names

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
    """The images of DIR/train or DIR/val, in torchvision's order.

    Attributes:
        classes: sorted list of the class names of train/, also for val/.
        index: the `common.scan.Index`, with the class names of this folder alone.
    """

    def __init__(self, root, split, classes=None):
        """Find the images.

        Args:
            root: the folder that holds train/ and val/, or their packs.
            split: "train" or "val".
            classes: names that replace those of train/ (an evaluation where only val/ is at hand).

        Raises:
            UserError: a folder is missing or empty, a pack is damaged, or val/ has a class that train/ does not know.
        """
        folder = os.path.join(root, split)
        check_folder(root, split)
        self._pack = _Pack(root, split) if os.path.isfile(pack_path(root, split)) else None
        self.index = scan.find_images(folder) if self._pack is None else self._pack.index
        self.classes = classes or (class_names(root, "train") if split != "train" else self.index.classes)
        known = {name: target for target, name in enumerate(self.classes)}
        unknown = [name for name in self.index.classes if name not in known]
        if unknown:
            raise UserError(
                "{} has {} class folders that train/ does not know: {}".format(
                    folder, len(unknown), printable(", ".join(unknown[:5]))
                )
            )
        if len(self.index.labels) == 0:
            raise UserError("{} has no images ({})".format(folder, " ".join(scan.EXTENSIONS)))
        targets = np.array([known[name] for name in self.index.classes])[self.index.labels]
        super().__init__(folder, (self.index.names, self.index.ends), targets)

    def read(self, index):
        """Return the bytes of image `index`, as `Images` does, or from the pack."""
        return super().read(index) if self._pack is None else self._pack.read(index)


class _Pack:
    """The two files of a packed folder: the images' bytes one after another, and the index."""

    def __init__(self, root, split):
        path, index_path = pack_path(root, split), pack_path(root, split, ".index.npz")
        try:
            with np.load(index_path, allow_pickle=False) as content:
                self.index, self._ends = scan.from_arrays(content), content["byte_ends"]
            size = os.path.getsize(path)
        except Exception as error:  # zipfile and numpy raise anything
            raise UserError("{} cannot be read: {}: pack the data set again".format(index_path, error)) from None
        if size != (self._ends[-1] if len(self._ends) else 0):
            raise UserError("{} has {} bytes, its index says {}: copy it again".format(path, size, self._ends[-1]))
        self._file = open(path, "rb", buffering=0)

    def read(self, index):
        start = int(self._ends[index - 1]) if index else 0
        size = int(self._ends[index]) - start
        data = os.pread(self._file.fileno(), size, start)  # no position, which the workers would share
        if len(data) != size:
            raise OSError("{} ends within image {}".format(self._file.name, index))
        return data


def _open_at_once(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe with an image's name would make us wait for its writer


def class_names(root, split):
    """Return the sorted class names of DIR/`split`, a folder or packed; raises UserError where it cannot be read."""
    if os.path.isfile(pack_path(root, split)):
        return _Pack(root, split).index.classes
    return scan.class_names(os.path.join(root, split))


def has_split(root, split):
    """Return whether DIR/`split` is there, as a folder or packed."""
    return os.path.isdir(os.path.join(root, split)) or os.path.isfile(pack_path(root, split))


def check_folder(root, *splits):
    """Raise UserError where DIR or one of its `splits` is missing or has no class folders."""
    if not os.path.isdir(root):
        raise UserError("data set {} is not a folder".format(root))
    for split in splits:
        if not has_split(root, split):
            raise UserError("data set {} has no {}/ folder".format(root, split))
        if not class_names(root, split):
            raise UserError(
                "{} has no class folders (one sub-folder of images per class)".format(os.path.join(root, split))
            )
