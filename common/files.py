"""Files that are replaced whole or not at all, in folders that one process at a time writes to."""

import contextlib
import fcntl
import glob
import os
import shutil
import time


def cache_folder():
    """Return the folder for what can be made again; it may not be there yet."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(place, "imagenet-bundles")


def _temporary(path):
    return "{}.tmp-{}".format(path, os.getpid())


def remove(path):
    """Remove the file `path` if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def find(folder, *patterns):
    """Return the paths of the files in `folder` whose names fit one of `patterns`, sorted."""
    found = {path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern))}
    return sorted(path for path in found if os.path.isfile(path))


def keep_aside(path):
    """Rename what is at `path`, if anything, to <path>.prev-<time>, and return its new name, else None."""
    if not os.path.lexists(path):
        return None
    kept = "{}.prev-{}".format(path, time.strftime("%Y%m%d-%H%M%S"))
    while os.path.lexists(kept):
        kept += "x"
    os.rename(path, kept)
    return kept


def sync(path):
    """Wait until the file or folder `path` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_beside(path, data):
    """Write `data` to a new file beside `path`, through to the disk, and return its name; a failure leaves nothing."""
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        sync(temporary)
    except BaseException:
        remove(temporary)
        raise
    return temporary


def link(source, target):
    """Replace `target` by a second name of the file `source`, or by a copy where the file system has no links."""
    temporary = _temporary(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            sync(temporary)
        os.replace(temporary, target)
    finally:
        remove(temporary)  # a rename between two names of one file does nothing


def remove_stale(path):
    """Remove what a killed process left when it was about to write `path`."""
    for stale in glob.glob(glob.escape(path) + ".tmp-*"):
        remove(stale)


def lock(folder, seconds=5):
    """Hold `folder` until this process ends; what was killed a moment ago may hold it a little longer.

    Raises:
        BlockingIOError: another process has held it for all of `seconds`.
    """
    handle = os.open(folder, os.O_RDONLY)  # never closed: that would end the lock
    deadline = time.time() + seconds
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.time() > deadline:
                raise
            time.sleep(0.1)
        except OSError:
            return None  # this file system has no locks
