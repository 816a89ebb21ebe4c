"""Ranks: starting one process per card, joining them in a process group, ending them together."""

import ctypes
import datetime
import os
import signal
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from common.errors import Stopped, UserError

DEFAULT_PORT = 29688  # of several nodes; one node takes a free port, so that two jobs never collide
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TERM_SECONDS = 30  # from the signal that asks a rank to end until it is killed


def add_arguments(parser):
    """Declare the options that say how many processes there are and how they meet."""
    group = parser.add_argument_group("ranks")
    group.add_argument(
        "--multiprocessing-distributed", action="store_true", help="start one process per card (so do several cards)"
    )
    group.add_argument("--device-list", metavar="IDS", help="cards of this node, e.g. '0,1,2,3' (CPU: one rank each)")
    group.add_argument("--device-num", "--device_num", type=int, metavar="N", help="number of cards of this node")
    group.add_argument("--world-size", type=int, default=1, metavar="NODES", help="number of nodes")
    group.add_argument("--rank", type=int, default=0, metavar="NODE", help="number of this node")
    group.add_argument("--addr", default="127.0.0.1", help="address of node 0")
    group.add_argument("--dist-url", metavar="tcp://HOST:PORT", help="meeting point (replaces --addr)")
    group.add_argument("--dist-backend", choices=["hccl", "nccl", "gloo"], help="default: what the device needs")
    group.add_argument("--max-restarts", type=int, default=0, metavar="N", help="restart all ranks after a failure")


def are_started():
    """Return whether this process is a rank already, started by us or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def card_ids(args):
    """Return the ids of this node's cards as a list of int.

    Raises:
        UserError: `--device-list` is not a list of different numbers, or contradicts `--device-num`.
    """
    text = args.device_list
    if text is None:
        return list(range(args.device_num or 1))
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        ids = []
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0:
        raise UserError("--device-list {!r} is not a list of different card numbers such as 0,1,2,3".format(text))
    if args.device_num not in (None, len(ids)):
        raise UserError("--device-list names {} cards, --device-num says {}".format(len(ids), args.device_num))
    return ids


def needs_launch(args):
    """Return whether `main.py` was started once and has to start its ranks itself.

    Raises:
        UserError: `--rank` is no node of `--world-size`.
    """
    if are_started():
        return False
    if not 0 <= args.rank < args.world_size:
        raise UserError("--rank {} is not a node of --world-size {} nodes".format(args.rank, args.world_size))
    return args.multiprocessing_distributed or len(card_ids(args)) > 1 or args.world_size > 1


def _meeting_point(args):
    url = args.dist_url
    if url and url.startswith("tcp://"):
        host, colon, port = url[len("tcp://") :].rpartition(":")
        if not colon or not port.isdigit():
            raise UserError("--dist-url {!r} is not of the form tcp://HOST:PORT".format(url))
        return host, int(port)
    if url and url != "env://":
        raise UserError("--dist-url {!r} is not of the form tcp://HOST:PORT".format(url))
    address = os.environ.get("MASTER_ADDR", args.addr) if url else args.addr
    port = os.environ.get("MASTER_PORT")
    if port is None and args.world_size == 1:
        with socket.socket() as free:
            free.bind((address, 0))
            return address, free.getsockname()[1]
    return address, int(port or DEFAULT_PORT)


def _check_port(address, port, node):
    if node != 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise UserError(
                "port {} of {} cannot be used ({}): another job runs there? Give --dist-url tcp://{}:PORT".format(
                    port, address, error.strerror, address
                )
            ) from None


def _rank_environment(args, ids, address, port):
    """Return one environment per rank of this node."""
    environments = []
    threads = str(max(1, (os.cpu_count() or 1) // len(ids)))
    for local_rank in range(len(ids)):
        environment = dict(os.environ)
        environment.update(
            RANK=str(args.rank * len(ids) + local_rank),
            LOCAL_RANK=str(local_rank),
            WORLD_SIZE=str(args.world_size * len(ids)),
            LOCAL_WORLD_SIZE=str(len(ids)),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
        )
        environment.setdefault("OMP_NUM_THREADS", threads)
        environments.append(environment)
    return environments


def launch(args, argv):
    """Start the ranks of this node, wait for them, and return the exit status of the job.

    When one rank fails the others are ended too, within a minute. SIGTERM and SIGINT are handed on to all ranks.
    """
    ids = card_ids(args)
    address, port = _meeting_point(args)
    command = [sys.executable, "-u", os.path.abspath(sys.argv[0])] + list(argv)
    if args.max_restarts:
        return _supervise([_elastic(args, ids, address, port) + command[2:]], [dict(os.environ)], elastic=True)
    _check_port(address, port, args.rank)
    environments = _rank_environment(args, ids, address, port)
    return _supervise([command] * len(ids), environments)


# `python -m torch.distributed.run` would end with a traceback of its own.
_ELASTIC_LAUNCHER = """
import sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    run.run(run.parse_args(sys.argv[1:]))
except ChildFailedError:
    sys.exit("[Error] the ranks failed again after all of --max-restarts; what they said is above")
except SignalException as stop:
    sys.exit(128 + stop.sigval)
"""


def _elastic(args, ids, address, port):
    """Return the command of torch's elastic launcher, which restarts all ranks when one fails."""
    try:
        import torch.distributed.run  # noqa: F401
    except ImportError:
        raise UserError("--max-restarts needs torch's elastic launcher, which this torch does not have") from None
    return [
        sys.executable,
        "-c",
        _ELASTIC_LAUNCHER,
        "--nproc_per_node={}".format(len(ids)),
        "--nnodes={}".format(args.world_size),
        "--node_rank={}".format(args.rank),
        "--master_addr={}".format(address),
        "--master_port={}".format(port),
        "--max_restarts={}".format(args.max_restarts),
        "--monitor_interval=1",
        "--rdzv_id={}-{}".format(os.getpid(), time.time()),  # by it the ranks know their own checkpoints again
    ]


def _supervise(commands, environments, elastic=False):
    asked = []  # the signals that arrived here
    for signum in STOP_SIGNALS:
        if not _is_ignored(signum):
            signal.signal(signum, lambda number, frame: asked.append(number))
    # A session of their own: a Ctrl-C of the terminal then reaches the ranks once, through us.
    ranks = [
        subprocess.Popen(command, env=environment, start_new_session=True)
        for command, environment in zip(commands, environments)
    ]
    told, deadline, failed = False, None, None
    while any(rank.poll() is None for rank in ranks):
        if asked and not told:
            # Once, whatever comes again; and not SIGINT, for which a rank that still imports prints a traceback.
            told, deadline = True, time.time() + TERM_SECONDS
            _send(ranks, signal.SIGTERM)
        if failed is None and not asked:
            failed = next((i for i, rank in enumerate(ranks) if rank.poll() not in (None, 0)), None)
            if failed is not None:
                _report(ranks[failed].returncode, failed, elastic)
                # The others wait for the dead one in a collective, and cannot be asked to save.
                deadline = time.time() + 5
                _send(ranks, signal.SIGTERM)
        if deadline and time.time() > deadline:
            _send(ranks, signal.SIGKILL)
        time.sleep(0.05)
    codes = [rank.returncode for rank in ranks]
    if asked:
        return 128 + asked[0]
    if failed is not None:
        return codes[failed] if codes[failed] > 0 else 128 - codes[failed]
    return max(code if code >= 0 else 128 - code for code in codes)


def _is_ignored(signum):
    """Return whether whoever started us wants us to outlive the terminal (nohup)."""
    return signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN


def _send(ranks, signum):
    for rank in ranks:
        if rank.poll() is None:
            # SIGKILL takes the rank's data-loading workers along.
            (os.killpg if signum == signal.SIGKILL else os.kill)(rank.pid, signum)


def _report(code, rank, elastic):
    if code < 0:
        name = signal.Signals(-code).name
        who = "the elastic launcher" if elastic else "rank {}".format(rank)
        hints = {signal.SIGKILL: " (out of memory? see dmesg)", signal.SIGBUS: " (is /dev/shm full?)"}
        hint = hints.get(-code, "")
        print("[Error] {} was killed by {}{}; ending the job".format(who, name, hint), file=sys.stderr, flush=True)


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
        if are_started():
            end_with_parent()
        for signum in STOP_SIGNALS:
            if not _is_ignored(signum):
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
            if not _is_ignored(signum):
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
        """Return the list of every rank's `value` (anything picklable), on all ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

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
