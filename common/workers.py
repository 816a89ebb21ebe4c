"""Worker processes that decode images into batches in shared memory; only the number of a batch travels back."""

import atexit
import inspect
import multiprocessing
import os
import random
import signal
import warnings

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.compiled import library
from common.decode import EncodedImage
from common.errors import UserError
from common.ranks import STOP_SIGNALS, end_with_parent

PADDING = -1  # target of a row that only fills up a batch
UNREADABLE = -2  # target of a validation image that could not be decoded
_PREFETCH = 2  # batches in work per process

# The default is the number of cores; whoever asks for more has a reason, slow disks for example.
warnings.filterwarnings("ignore", message="This DataLoader will create")


class BatchWriter(torch.utils.data.Dataset):
    """Data set of whole batches: item (slot, epoch, positions, indices) is written into the shared batch `slot`."""

    def __init__(self, images, transform, pixels, targets, seed, training, tries):
        self.images, self.transform, self.pixels, self.targets = images, transform, pixels, targets
        self.seed, self.training, self.tries = seed, training, tries

    def __getitem__(self, request):
        slot, epoch, positions, indices = request
        bad = []
        for row, (position, index) in enumerate(zip(positions.tolist(), indices.tolist())):
            if self.training:
                _seed_draws(self.seed, epoch, position)
            self.targets[slot, row] = self._load(index, self.pixels[slot, row], bad)
        self.targets[slot, len(indices) :] = PADDING
        return slot, len(indices), bad

    def _load(self, index, out, bad):
        """Write image `index` into `out` and return its target; in training a bad one is replaced by the next."""
        count = len(self.images)
        # With more bad ones than are allowed the run ends; there is no need to look for a good one.
        for candidate in range(index, index + min(count, self.tries)):
            candidate %= count
            try:
                self.transform(EncodedImage(self.images.read(candidate)), out)
                return int(self.images.targets[candidate])
            except Exception as error:  # decoders raise anything; what it was is reported
                bad.append((candidate, "{}: {}".format(type(error).__name__, error)))
        out.zero_()
        return UNREADABLE


def _seed_draws(seed, epoch, position):
    key = ((seed * 1000003 + epoch) << 40) + position
    random.seed(key)
    np.random.seed((key ^ key >> 32) % 2**32)
    torch.default_generator.manual_seed(key % 2**63)


def _start_worker(_):
    end_with_parent()
    for signum in STOP_SIGNALS:  # the rank decides when to end, and ends its workers
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_workers():
    # They ignore the SIGTERM by which multiprocessing would end them, and one that hangs must not hold us up.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as an error
    for worker in multiprocessing.active_children():
        worker.kill()


atexit.register(_end_workers)


def _as_is(item):
    return item


def slots(processes):
    """Return how many batches must fit into shared memory: in work, handed over, and two on the way to the device."""
    return max(1, processes) * _PREFETCH + 3


def start(writer, requests, processes):
    """Return an iterable over the items of the `BatchWriter` that the sampler `requests` asks for.

    The processes start with its first iteration, and serve the later ones too; with none of them this one decodes.
    """
    library("jpeg")  # compiled here, and not in each of them
    options = {"num_workers": processes, "collate_fn": _as_is, "worker_init_fn": _start_worker}
    if processes:
        newer = {"prefetch_factor": _PREFETCH, "persistent_workers": True}
        known = inspect.signature(DataLoader.__init__).parameters
        options.update((name, value) for name, value in newer.items() if name in known)
    return DataLoader(writer, batch_size=None, sampler=requests, **options)


def check_shared_memory(size, processes):
    """Raise UserError where `processes` cannot share `size` bytes."""
    folder = "/dev/shm"
    if processes and os.path.isdir(folder):
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
        if size > free:
            raise UserError(
                "batches in shared memory need {:.0f} MB, {} has {:.0f} MB free: fewer --workers, a smaller batch, "
                "or a container with --ipc=host or --shm-size".format(size / 1e6, folder, free / 1e6)
            )
