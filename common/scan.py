"""Which images a folder of class folders holds: the scan, and its copy in the user's cache for the next start."""

import collections
import hashlib
import io
import os
import time
import zipfile

import numpy as np

from common import files
from common.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
CACHED_FROM = 10000  # images; fewer are found in no time
_MARGIN = 2 * 10**9  # nanoseconds: a folder changed this shortly before the scan may change again with the same time

# classes: list of the class names, sorted. names, ends: those of the images, relative to the folder, as `join` returns
# them. labels: int64 [n], numbers into classes.
Index = collections.namedtuple("Index", "classes names ends labels")


def join(names):
    """Return (uint8, int64 [n]): the bytes of all `names` (list of str) one after another, and where each ends.

    A list of a million strings would be copied into every worker, page by page, as its reference counts are touched.
    """
    names = [os.fsencode(name) for name in names]
    ends = np.cumsum(np.array([len(name) for name in names], dtype=np.int64))
    return np.frombuffer(b"".join(names), dtype=np.uint8), ends


def class_names(folder):
    """Return the sorted names of the sub-folders of `folder`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError("{}: {}".format(folder, error.strerror)) from None


def find_images(folder):
    """Return the `Index` of `folder`, from the cache where none of its folders has changed since."""
    index = _load(folder)
    if index is None:
        started = time.time_ns()
        index, folders = _scan(folder)
        if len(index.labels) >= CACHED_FROM:
            _save(folder, index, folders, started)
    return index


def _scan(folder):
    """Return (`Index` of `folder`, list of all folders in it, itself first)."""
    classes, names, labels, folders = class_names(folder), [], [], [""]
    for label, name in enumerate(classes):
        inside = image_names(folder, name, folders)
        names += inside
        labels += [label] * len(inside)
    return Index(classes, *join(names), np.array(labels, dtype=np.int64)), folders


def image_names(root, inside="", folders=None):
    """Return the sorted names, relative to `root`, of all image files below its sub-folder `inside`.

    The names of the folders they were looked for in are added to the list `folders`.
    """
    names = []
    for folder, _, found in sorted(os.walk(os.path.join(root, inside), followlinks=True)):
        chosen = sorted(file for file in found if file.lower().endswith(EXTENSIONS))
        place = os.path.normpath(os.path.join(inside, os.path.relpath(folder, os.path.join(root, inside))))
        names += chosen if place == os.curdir else [os.path.join(place, file) for file in chosen]
        if folders is not None:
            folders.append(place)
    return names


def as_arrays(index):
    """Return the `Index` as a dict of numpy arrays, for a file."""
    return dict(index._asdict(), classes=np.frombuffer(os.fsencode("/".join(index.classes)), dtype=np.uint8))


def from_arrays(content):
    """Return the `Index` that `as_arrays` made `content` from; raises KeyError or ValueError for anything else."""
    index = Index(*(content[name] for name in Index._fields))
    classes = os.fsdecode(index.classes.tobytes())
    if len(index.ends) != len(index.labels) or len(index.names) != (index.ends[-1] if len(index.ends) else 0):
        raise ValueError("the arrays do not fit together")
    return index._replace(classes=classes.split("/") if classes else [])


def _cache_path(folder):
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    return os.path.join(files.cache_folder(), key + ".npz")


def _times(folder, folders):
    return np.array([os.stat(os.path.join(folder, name)).st_mtime_ns for name in folders])


def _load(folder):
    try:
        with np.load(_cache_path(folder), allow_pickle=False) as content:
            folders = os.fsdecode(content["folders"].tobytes()).split("\0")
            if np.array_equal(_times(folder, folders), content["times"]):
                return from_arrays(content)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or not ours: the scan makes a new one
        pass
    return None


def _save(folder, index, folders, started):
    path = _cache_path(folder)
    try:
        times = _times(folder, folders)
        if times.max() > started - _MARGIN:
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        content = io.BytesIO()
        folders = np.frombuffer(os.fsencode("\0".join(folders)), dtype=np.uint8)
        np.savez(content, folders=folders, times=times, **as_arrays(index))
        os.replace(files.write_beside(path, content.getvalue()), path)
    except OSError:
        pass  # a home that cannot be written: the next start scans again
