"""Ranks that meet, add up numbers, and end in one of many ways: ranks.py [--what END] [--who RANK] [rank flag ...]"""

import contextlib
import os
import pathlib
import signal
import sys
import time

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[2]))
import torch

import common  # noqa: F401
from common import arguments, distributed, errors


def main(argv=None):
    parser = arguments.build_parser(__doc__)
    arguments.add_shared(parser)
    parser.add_argument("--what", default="")
    parser.add_argument("--who", default="")
    args = parser.parse_args(argv)
    if distributed.should_spawn(args):
        return distributed.spawn(args, argv)
    ranks = distributed.Ranks()
    what = args.what if args.who in ("", str(ranks.rank)) else ""
    if what == "error before":
        raise errors.UserError("wrong before the ranks have met")
    ranks.join("gloo")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    values = [str(value) for value in ranks.all_gather({"rank": ranks.rank})]
    sys.stdout.write("met: {}, threads {}, attempt {}\n".format(values, os.environ.get("OMP_NUM_THREADS"), attempt))
    sys.stdout.flush()
    ranks.catch_signals()
    for step in range(1000000 if args.what == "endless" else 10):
        time.sleep(0.01)
        if what == "error" and step == 5:
            raise errors.UserError("wrong in step 5")
        if what == "bug" and step == 5:
            raise ZeroDivisionError("a mistake in step 5")
        if what == "kill" and step == 5:
            os.kill(os.getpid(), 9)
        if what == "kill twice" and step == 5 and attempt in ("0", "1"):
            os.kill(os.getpid(), 9)
        if what == "status 7" and step == 5:
            os._exit(7)
        stop_signal = ranks.sum(torch.tensor([ranks.stop_signal])).item()
        if stop_signal:
            time.sleep(1)
            sys.stdout.write("saved\n")
            with contextlib.suppress(RuntimeError):  # as checkpoint.Checkpoints.after_step does
                ranks.all_gather("saved")
            raise errors.Stopped(signal.SIGTERM)
    return 0


errors.run_and_exit(main)
