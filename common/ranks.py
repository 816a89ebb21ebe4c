"""Ranks: this process's place in the group of all processes of a job, and how they decide and end together."""

import ctypes
import datetime
import json
import os
import signal
import sys

import torch
import torch.distributed as dist

from common.errors import Stopped, UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def are_started():
    """Return whether this process is a rank already, started by us or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_ignored(signum):
    """Return whether whoever started us wants us to outlive the terminal (nohup)."""
    return signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN


class Ranks:
    """This process's place among the ranks of a job.

    Attributes:
        rank, local_rank, world_size, local_world_size: int, as torchrun names them; 0, 0, 1, 1 without a group.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self._host_group = None
        self._stop_signal, self._waiting = 0, False

    @property
    def is_main(self):
        """Whether this rank writes the files and the log."""
        return self.rank == 0

    def join(self, backend, minutes=40):
        """Join the process group; the group of the device carries tensors, a gloo group beside it host numbers.

        `minutes` is more than the 1836 s that HCCL waits: its own error says more than ours.
        """
        end_with_script()
        if are_started():
            end_with_parent()
        for signum in STOP_SIGNALS:
            if not is_ignored(signum):
                signal.signal(signum, signal.SIG_DFL)  # nothing is to be saved yet
        if self.world_size == 1:
            return
        timeout = datetime.timedelta(minutes=minutes)
        try:
            dist.init_process_group(backend, timeout=timeout, **self._meeting(timeout))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                "rank {} of {} did not meet the others at {}:{}: {}".format(
                    self.rank,
                    self.world_size,
                    os.environ.get("MASTER_ADDR"),
                    os.environ.get("MASTER_PORT"),
                    str(error).splitlines()[0],
                )
            ) from None
        # Host decisions must neither wait for the device nor be computed on it.
        self._host_group = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else dist.group.WORLD

    def _meeting(self, timeout):
        """Return the arguments of `init_process_group` that say where the ranks meet."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return {"init_method": "env://"}
        # The launcher's store outlives the ranks: what those before a restart have left there is not for us.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, self.world_size, False, timeout)
        attempt = "attempt {}".format(os.environ.get("TORCHELASTIC_RESTART_COUNT"))
        return {"store": dist.PrefixStore(attempt, store), "rank": self.rank, "world_size": self.world_size}

    def catch_signals(self, save):
        """From now on a signal does not end the process: `agree` calls `save(signum)` first, and raises `Stopped`."""
        self._save = save
        for signum in STOP_SIGNALS:
            if not is_ignored(signum):
                signal.signal(signum, self._remember)

    def _remember(self, signum, frame):
        self._stop_signal = signum
        if self._waiting:
            self._waiting = False
            raise _SignalArrived

    def wait(self, function):
        """Return `function()`, or None as soon as a signal arrives: then `agree` must follow."""
        try:
            try:
                self._waiting = True
                return None if self._stop_signal else function()
            finally:
                self._waiting = False
        except _SignalArrived:
            return None

    def agree(self, number=0):
        """Return the largest `number` (int) of all ranks. All call it together before each batch.

        Raises:
            Stopped: a signal reached one of the ranks, and what was to be saved has been.
        """
        signum, number = self._max_on_host(self._stop_signal, number)
        if signum:
            self._save(signum)
            self.barrier()  # a rank that ended earlier would be taken for a failure while rank 0 still writes
            self.leave()
            raise Stopped(signum)
        return number

    def _max_on_host(self, *numbers):
        if self.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._host_group)
        return tensor.tolist()

    def sum(self, tensor):
        """Return `tensor` summed over the ranks, in place. float64 is not for hccl: give float32 or int64."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        """Wait until all ranks are here."""
        self._max_on_host(0)

    def gather_on_host(self, value):
        """Return the list of every rank's `value` (anything JSON can write), on all ranks."""
        if self.world_size == 1:
            return [value]
        text = json.dumps(value).encode()
        (longest,) = self._max_on_host(len(text))
        mine = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(texts, mine, group=self._host_group)
        return [json.loads(bytes(text.tolist())) for text in texts]

    def broadcast_buffers(self, model):
        """Give all ranks rank 0's buffers (BatchNorm statistics), which each rank collects for itself in training."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def leave(self):
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class _SignalArrived(BaseException):
    """Ends a wait; no `except Exception` on the way may take it for an error."""


def end_with_parent():
    """Have the kernel end this process when the one that started it is killed, so that none is left alone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def end_with_script():
    """Do so where test/train_*.sh is the parent: whoever kills the script means the job."""
    if "STARTED_BY_SCRIPT" in os.environ:
        end_with_parent()
