"""Ranks: this process's place among all processes of a job, and the launcher that starts one for each card."""

import ctypes
import datetime
import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common import npu
from common.errors import Stopped, UserError, is_distributed, print_error

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
JOIN_SECONDS = 2400  # more than the 1836 s of HCCL, whose own error says more than ours
SAVE_SECONDS = 40  # from the signal that asks the ranks to end until they are killed; torchrun kills them after 30
DEFAULT_PORT = 29688


class Ranks:
    """This process's place among the ranks of a job, as torchrun numbers them, and the signal that asked it to end."""

    def __init__(self):
        place = os.environ if is_distributed() else {}
        self.rank, self.local_rank = (int(place.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        self.world_size = int(place.get("WORLD_SIZE", 1))
        self.local_world_size = int(place.get("LOCAL_WORLD_SIZE", self.world_size))
        self.is_rank0 = self.rank == 0
        self.stop_signal = 0
        self._store, self._gathered = None, 0

    def join(self, backend):
        """Join the process group of `backend`; raise UserError where the ranks do not meet, or the nodes differ."""
        end_with_parent()
        if self.world_size == 1:
            return
        timeout = datetime.timedelta(seconds=JOIN_SECONDS)
        try:
            store, rank, world_size = next(rendezvous("env://", timeout=timeout))
            # The launcher's store outlives a restart: what the ranks before it have left there is not for us.
            self._store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=world_size, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise UserError("the ranks did not meet: {}".format(str(error).splitlines()[0])) from None
        counts = self.all_gather(self.local_world_size)
        if len(set(counts)) > 1:
            raise UserError("the nodes have different numbers of cards: {} and {}".format(min(counts), max(counts)))

    def catch_signals(self):
        """From now on a signal does not end the process: the first one becomes `stop_signal`."""

        def remember(signum, frame):
            self.stop_signal = self.stop_signal or signum

        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(signum, remember)

    def sum(self, tensor):
        """Return `tensor` summed over the ranks, in place. float64 is not for hccl: give float32 or int64."""
        try:
            if self.world_size > 1:
                dist.all_reduce(tensor)
        except RuntimeError as error:  # other ranks have followed the signal already
            raise (Stopped(self.stop_signal) if self.stop_signal else error) from None
        return tensor

    def all_gather(self, value):
        """Return the list of every rank's `value` (what JSON can write), on all ranks, once all of them are here."""
        if self.world_size == 1:
            return [value]
        self._gathered += 1  # each key is written once
        key = "gathered {} of rank {}".format
        self._store.set(key(self._gathered, self.rank), json.dumps(value))
        return [json.loads(self._store.get(key(self._gathered, rank))) for rank in range(self.world_size)]

    def gather_buffers(self, model):
        """Return every rank's floating-point buffers of `model` (BatchNorm's statistics, its own in training), flat."""
        buffers = [buffer.flatten() for buffer in _floating_buffers(model)]
        if self.world_size == 1 or not buffers:
            return []
        gathered = [torch.cat(buffers) for _ in range(self.world_size)]
        dist.all_gather(gathered, torch.cat(buffers))
        return gathered

    def average_buffers(self, model):
        """Give all ranks the mean of their floating-point buffers; where they are equal, they stay so to the digit."""
        gathered = self.gather_buffers(model)
        if gathered:
            set_buffers(model, gathered[0] + sum(values - gathered[0] for values in gathered) / self.world_size)


def set_buffers(model, values):
    """Set the floating-point buffers of `model` to the flat `values`, as `Ranks.gather_buffers` returns them."""
    buffers = _floating_buffers(model)
    for buffer, part in zip(buffers, values.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(part.view_as(buffer))


def _floating_buffers(model):
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def end_with_parent():
    """Have the kernel kill this process when the script, launcher or rank that started it ends (not a user's shell)."""
    pr_set_pdeathsig, parent = 1, os.environ.get("PARENT_PID")
    if is_distributed() or parent:
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # Where it has ended before, so does this process now; a wrapper may stand between them.
    if parent and parent != str(os.getppid()) and not os.path.exists("/proc/{}/exe".format(parent)):
        sys.exit("[Error] the process that started this one has ended")
    os.environ["PARENT_PID"] = str(os.getpid())  # for the processes that this one starts


def card_ids(args):
    """Return the ids of this node's cards as a list of int; raise UserError where the options contradict each other."""
    started = Ranks().local_world_size if is_distributed() else None  # the user's torchrun decides how many there are
    if args.device_list is None:
        return list(range(started or args.device_num or 1))
    words = args.device_list.split(",")
    ids = [int(word) for word in words if word.strip().isdecimal()]
    if not len(set(ids)) == len(words) == (args.device_num or len(words)):
        text = "--device-list {!r} is not a list of {} different card numbers (such as 0,1)"
        raise UserError(text.format(args.device_list, args.device_num or len(words)))
    return ids if started in (None, len(ids)) else list(range(started))


def should_spawn(args):
    """Return whether `main.py` has to start ranks itself; raise UserError where the options contradict each other."""
    if is_distributed():
        return False
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        text = "RANK and WORLD_SIZE are set, LOCAL_RANK is no number: set it and LOCAL_WORLD_SIZE (0 and 1 on a node "
        raise UserError(text + "of one card), or unset them and give --world-size, --rank and --addr")
    if args.rank >= args.world_size:
        raise UserError("--rank {} is not a node of --world-size {} nodes".format(args.rank, args.world_size))
    if args.world_size > 1 and not args.addr and not args.dist_url:
        raise UserError("--world-size {}: give --addr HOST, the address of node 0".format(args.world_size))
    return args.world_size * len(card_ids(args)) > 1 or args.multiprocessing_distributed or args.max_restarts > 0


def spawn(args, argv):
    """Start the ranks of this node with the options `argv`, wait for them, and return the exit status of the job.

    When one fails the others are ended within a minute; a signal is handed on to all, as SIGTERM. Raises UserError
    where torch is too old for `--max-restarts`.
    """
    end_with_parent()
    count, own, fork = len(card_ids(args)), Ranks(), multiprocessing.get_context("fork")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // count)))
    if args.device == "npu":
        npu.bind_cores(count)
    script = [os.path.abspath(sys.argv[0]), *(sys.argv[1:] if argv is None else argv)]
    job = args, count, _node_0(args), script
    processes = [fork.Process(name="the launcher", target=_run_torchrun, args=job)]
    if importlib.util.find_spec("torch.distributed.run") is None:  # older launchers kill ranks that want to save
        if args.max_restarts:
            raise UserError("--max-restarts: torch {} has no launcher that restarts".format(torch.__version__))
        numbers = range(args.rank * count, (args.rank + 1) * count)
        processes = [fork.Process(name="rank {}".format(i), target=_become_rank, args=(i, *job)) for i in numbers]
    for process in processes:
        process.start()
    own.catch_signals()
    codes = [None]
    while None in codes and not any(codes) and not own.stop_signal:
        time.sleep(0.05)
        codes = [process.exitcode for process in processes]
    deadline = time.monotonic() + SAVE_SECONDS
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
    if own.stop_signal:
        return 128 + own.stop_signal
    name, code = next(((p.name, code) for p, code in zip(processes, codes) if code), ("", 0))
    return code if code >= 0 else _report(name, code)


def _node_0(args):
    """Return (host, port) where the nodes meet; on one node a free port."""
    if args.world_size == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()
    url = args.dist_url or "tcp://{}:{}".format(args.addr, DEFAULT_PORT)
    if url == "env://":
        url = "tcp://{}:{}".format(os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", DEFAULT_PORT))
    host, port = url[len("tcp://") :].rsplit(":", 1)
    print("node {} of {} meets the others at {}:{}".format(args.rank, args.world_size, host, port), flush=True)
    return host, int(port)


def _report(name, code):
    """Return the exit status for `code` (as of Popen), after a line that says who ended so where nothing else has."""
    if code < 0:
        print_error("{} was killed by {} (out of memory? see dmesg)".format(name, signal.Signals(-code).name))
    elif code not in (1, *(128 + signum for signum in STOP_SIGNALS)):
        print_error("{} ended with status {}".format(name, code))
    return code if code > 0 else 128 - code


def _run_torchrun(args, count, node_0, script):
    """Run the ranks of this node, restart them if wanted, and end this process with the job's exit status."""
    os.setsid()  # a signal of the terminal comes through `spawn`, once
    end_with_parent()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # of what our one line says, and tracebacks
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # torchrun's own defaults, which clusters set
    place = "--standalone --local_addr=127.0.0.1"
    if args.world_size > 1:
        place = "--nnodes={} --node_rank={} --master_addr={} --master_port={} --rdzv_conf=timeout={}"
        place = place.format(args.world_size, args.rank, *node_0, JOIN_SECONDS)
    ranks = "--nproc_per_node={} --max_restarts={} --monitor_interval=0.1".format(count, args.max_restarts)
    try:
        socket.getaddrinfo(*node_0)
        if args.rank > 0:  # torchrun would wait JOIN_SECONDS; this takes 15 to 45 s
            dist.TCPStore(*node_0, None, False, datetime.timedelta(seconds=15), wait_for_workers=False)
        with tempfile.TemporaryDirectory() as folder:
            run.run(run.parse_args([*place.split(), *ranks.split(), "--log_dir=" + folder, *script]))
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as failure:
        rank, process = failure.get_first_failure()
        sys.exit(_report("rank {}".format(rank), process.exitcode))
    except (OSError, RuntimeError) as error:
        text = "the nodes did not meet at {}:{} (is node 0 started, are --addr and the port right?): {}"
        print_error(text.format(*node_0, str(error).splitlines()[0]))
        sys.exit(1)


def _become_rank(rank, args, count, node_0, script):
    """Replace this process by a rank."""
    os.setsid()
    place = {"RANK": rank, "LOCAL_RANK": rank % count, "LOCAL_WORLD_SIZE": count, "WORLD_SIZE": args.world_size * count}
    place.update(MASTER_ADDR=node_0[0], MASTER_PORT=node_0[1])
    os.environ.update((name, str(value)) for name, value in place.items())
    os.execv(sys.executable, [sys.executable, "-u", *script])
