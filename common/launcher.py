"""The launcher: one process per card of this node, ended together."""

import os
import signal
import socket
import subprocess
import sys
import time

from common.errors import UserError, say
from common.ranks import STOP_SIGNALS, are_started, end_with_script, is_ignored

DEFAULT_PORT = 29688  # of several nodes; one node takes a free port, so that two jobs never collide
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


def _reserve_port(address, port, node):
    """Return a socket that, while it is open, keeps this machine's other jobs off the port of node 0.

    Raises:
        UserError: another job has reserved the port, or another program listens there.
    """
    reserved = socket.socket(socket.AF_UNIX)
    try:
        if node == 0:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
            if sys.platform == "linux":
                # Rank 0 listens seconds from now: until then ranks of two jobs would take each other for their own.
                reserved.bind("\0training on port {}".format(port))
    except OSError as error:
        raise UserError(
            "port {} of {} cannot be used ({}): another job runs there? Give --dist-url tcp://{}:PORT".format(
                port, address, error.strerror, address
            )
        ) from None
    return reserved


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
    end_with_script()
    ids = card_ids(args)
    address, port = _meeting_point(args)
    command = [sys.executable, "-u", os.path.abspath(sys.argv[0])] + list(argv)
    with _reserve_port(address, port, args.rank):
        if args.max_restarts:
            return _supervise([_elastic(args, ids, address, port) + command[2:]], [dict(os.environ)], elastic=True)
        return _supervise([command] * len(ids), _rank_environment(args, ids, address, port))


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
        if not is_ignored(signum):
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
        say("{} was killed by {}{}; ending the job".format(who, name, hint))
