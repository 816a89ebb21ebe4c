"""Ranks: this process's place among all processes of a job, and the launcher that starts one for each card."""

import ctypes
import datetime
import importlib.util
import json
import logging
import math
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

from common import errors
from common.errors import Stopped, UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
JOIN_SECONDS = 2400  # more than the 1836 s of HCCL, whose own error says more than ours
SAVE_SECONDS = 40  # from the signal that asks the ranks to end until they are killed; torchrun kills them after 30
DEFAULT_PORT = 29688


class Ranks:
    """This process's place among the ranks of a job.

    Attributes:
        rank, local_rank, world_size, local_world_size: int, as torchrun names them; 0, 0, 1, 1 without a group.
        stop_signal: int, the signal that asked this process to end; 0 without one.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.is_rank0 = self.rank == 0
        self.stop_signal = 0
        self._store, self._gathered = None, 0

    def join(self, backend):
        """Join the process group of `backend`; raise UserError where the ranks do not meet, or the nodes differ."""
        if is_distributed() or "PARENT_PID" in os.environ:
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
        """From now on a signal does not end the process: it sets `stop_signal`."""
        _handle_signals(self._remember)

    def _remember(self, signum, frame):
        self.stop_signal = signum

    def sum(self, tensor):
        """Return `tensor` summed over the ranks, in place. float64 is not for hccl: give float32 or int64."""
        if self.world_size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError:  # others have followed the signal already
                if self.stop_signal:
                    raise Stopped(self.stop_signal) from None
                raise
        return tensor

    def all_gather(self, value):
        """Return the list of every rank's `value` (what JSON can write), on all ranks."""
        if self.world_size == 1:
            return [value]
        self._gathered += 1  # each key is written once
        key = "gathered {} of rank {}".format
        self._store.set(key(self._gathered, self.rank), json.dumps(value))
        return [json.loads(self._store.get(key(self._gathered, rank))) for rank in range(self.world_size)]

    def barrier(self):
        """Wait until all ranks are here."""
        self.all_gather(None)

    def broadcast_buffers(self, model):
        """Give all ranks rank 0's buffers (BatchNorm statistics), which each rank collects for itself in training."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def _handle_signals(handler):
    for signum in STOP_SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # it is ignored under nohup
            signal.signal(signum, handler)


def end_with_parent():
    """Have the kernel kill this process when the one that started it ends, so that none is left alone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = str(os.getppid())
    if is_distributed() and os.environ.get("PARENT_PID", parent) != parent:  # it has ended before
        raise UserError("the process that started this one has ended")
    os.environ["PARENT_PID"] = str(os.getpid())  # for the processes that this one starts


def is_distributed():
    """Return whether this process is a rank already, started by `spawn` or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def card_ids(args):
    """Return the ids of this node's cards as a list of int; raise UserError where the options contradict each other."""
    if args.device_list is None:
        return list(range(args.device_num or 1))
    words = [word.strip() for word in args.device_list.split(",")]
    ids = [int(word) for word in words if word.isdigit()]
    if len(set(ids)) != len(words):
        text = "--device-list {!r} is not a list of different card numbers such as 0,1,2,3"
        raise UserError(text.format(args.device_list))
    if args.device_num not in (None, len(ids)):
        raise UserError("--device-list names {} cards, --device-num says {}".format(len(ids), args.device_num))
    return ids


def should_spawn(args):
    """Return whether `main.py` has to start ranks itself; raise UserError where the options contradict each other."""
    count = len(card_ids(args))
    if is_distributed():
        return False
    if args.rank >= args.world_size:
        raise UserError("--rank {} is not a node of --world-size {} nodes".format(args.rank, args.world_size))
    if args.world_size > 1 and not args.addr and not args.dist_url:
        raise UserError("--world-size {}: give --addr HOST, the address of node 0".format(args.world_size))
    return args.multiprocessing_distributed or count > 1 or args.world_size > 1


def spawn(args, argv):
    """Start the ranks of this node with the options `argv`, wait for them, and return the exit status of the job.

    When one rank fails the others are ended within a minute. A signal is handed on to all ranks, as SIGTERM.
    Raise UserError where the host of node 0 is unknown, or torch is too old for `--max-restarts`.
    """
    if "PARENT_PID" in os.environ:
        end_with_parent()
    os.environ["PARENT_PID"] = str(os.getpid())
    count, node_0 = len(card_ids(args)), _node_0(args)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    script = [os.path.abspath(sys.argv[0]), *(sys.argv[1:] if argv is None else argv)]
    launchers, target = 1, _run_torchrun
    if importlib.util.find_spec("torch.distributed.run") is None:  # older launchers kill ranks that want to save
        launchers, target = count, _become_rank
        if args.max_restarts:
            raise UserError("--max-restarts: torch {} has no launcher that restarts".format(torch.__version__))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=target, args=(i, args, count, node_0, script)) for i in range(launchers)]
    for process in processes:
        process.start()
    signals, failed, deadline = [], None, math.inf
    _handle_signals(lambda signum, frame: signals.append(signum))
    while any(process.is_alive() for process in processes) and time.time() < deadline:
        time.sleep(0.05)
        failed = failed or next((process for process in processes if process.exitcode), None)
        if (signals or failed) and deadline == math.inf:
            deadline = time.time() + SAVE_SECONDS
            for process in processes:
                process.terminate()
    if signals or not failed:
        return 128 + signals[0] if signals else 0
    name = "the launcher" if launchers == 1 else "rank {}".format(args.rank * count + processes.index(failed))
    return failed.exitcode if failed.exitcode > 0 else _report(name, failed.exitcode)


def _node_0(args):
    """Return (host, port) where the nodes meet; on one node a free port."""
    if args.world_size == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()
    url = args.dist_url or "tcp://{}:{}".format(args.addr, DEFAULT_PORT)
    if url == "env://":
        url = "tcp://{}:{}".format(os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", DEFAULT_PORT))
    host, _, port = url[len("tcp://") :].rpartition(":")
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise UserError("node 0 cannot be at {}:{}: {}".format(host, port, error)) from None
    print("node {} of {} meets the others at {}:{}".format(args.rank, args.world_size, host, port), flush=True)
    return host, int(port)


def _report(name, code):
    """Return the exit status for `code` (as of Popen), after a line that says who ended so."""
    if code < 0:
        hints = {signal.SIGKILL: " (out of memory? see dmesg)", signal.SIGBUS: " (is /dev/shm full?)"}
        errors.print_error("{} was killed by {}{}".format(name, signal.Signals(-code).name, hints.get(-code, "")))
        return 128 - code
    if code not in (1, *(128 + signum for signum in STOP_SIGNALS)):  # with these it has said why
        errors.print_error("{} ended with status {}".format(name, code))
    return code


def _run_torchrun(_, args, count, node_0, script):
    """Run the ranks of this node, restart them if wanted, and end this process with the job's exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def main():
        os.setsid()  # a signal of the terminal comes through `spawn`, once
        end_with_parent()
        logging.disable(logging.CRITICAL)  # of what our one line says, and tracebacks
        options = "--standalone --local_addr=127.0.0.1"
        if args.world_size > 1:
            options = "--nnodes={} --node_rank={} --master_addr={} --master_port={} --rdzv_conf=timeout={}".format(
                args.world_size, args.rank, *node_0, JOIN_SECONDS
            )
        options += " --nproc_per_node={} --max_restarts={} --monitor_interval=0.1".format(count, args.max_restarts)
        try:
            if args.rank > 0:  # torchrun would wait as long for a wrong address as for nodes that start late
                dist.TCPStore(*node_0, None, False, datetime.timedelta(seconds=30), wait_for_workers=False)
            with tempfile.TemporaryDirectory() as folder:
                run.run(run.parse_args([*options.split(), "--log_dir=" + folder, *script]))
            return 0
        except SignalException as stop:
            return 128 + stop.sigval
        except ChildFailedError as failure:
            rank, process = failure.get_first_failure()
            return _report("rank {}".format(rank), process.exitcode)
        except RuntimeError as error:
            text = "the nodes did not meet (is node 0 started, are --addr and the port right?): {}"
            raise UserError(text.format(str(error).splitlines()[0])) from None

    sys.exit(errors.run(main))


def _become_rank(local_rank, args, count, node_0, script):
    """Replace this process by a rank."""
    os.setsid()
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (args.rank * count + local_rank, local_rank, count, args.world_size * count, *node_0)
    os.environ.update((name, str(value)) for name, value in zip(names, values))
    os.execv(sys.executable, [sys.executable, "-u", *script])
