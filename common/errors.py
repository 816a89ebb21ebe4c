"""Errors that a user can cure: one line on the screen instead of a traceback, and the exit status of a process."""

import atexit
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback

ANOTHER_RANK = "another rank has ended, what it said tells why"
_MEMORY = "out of memory|MemoryError|allocate memory|not enough memory"
HINTS = (  # (pattern in the text of an error, what to do)
    (_MEMORY, "a smaller --batch-size (--lr in proportion) or fewer --workers"),
    ("gloo.*(closed by peer|reset by peer|broken pipe)", ANOTHER_RANK),
    ("error code is 507(033|899)", "is the card healthy (npu-smi info), is its /dev/davinci* in the container?"),
    ("error code is 500001", "torch_npu and CANN do not fit each other: see the table of versions in README.md"),
    ("EI0006", "the cards cannot reach each other: firewall, HCCL_SOCKET_IFNAME, the same CANN everywhere"),
    ("EI0002", "a rank waited for the others: look for the rank that stopped first, then for HCCL_EXEC_TIMEOUT"),
    ("Cannot find bin of op", "CANN's kernels (ops) package of this chip is missing"),
)


class UserError(Exception):
    """Something the user can put right; its text says what was wrong, where, and what to do."""


class Stopped(Exception):
    """A signal asked for the end, and everything worth keeping has been saved."""

    def __init__(self, signum):
        super().__init__("stopped by {}".format(signal.Signals(signum).name))
        self.exit_code = 128 + signum


def printable(text):
    """Return `text` on one line, control characters replaced, so that no name can forge a line of a log."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def print_error(text):
    """Print one line on standard error, naming the rank where there are several."""
    rank = " rank {}:".format(os.environ["RANK"]) if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    over_live_line = "\r\033[K" if sys.stderr.isatty() else ""
    print("{}[Error]{} {}".format(over_live_line, rank, printable(text)), file=sys.stderr, flush=True)


def run(main):
    """Call `main()` and return the exit status of the process; no exception becomes a traceback on the screen."""
    try:
        return main() or 0
    except Stopped as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else _describe(error)
        if "RANK" in os.environ:  # the end of a rank ends the others: first the one with the cause, then local rank 0
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10 if ANOTHER_RANK in text else 5 * min(1, int(os.environ.get("LOCAL_RANK", 0))))
        print_error(text)
        return 1
    finally:
        for child in multiprocessing.active_children():
            child.kill()
        for thread in threading.enumerate():  # those of process pools notice it; Python's exit would race them
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join(5)


def run_and_exit(main):
    """End the process with the status of `run(main)`.

    Destructors of native code are left out: they race its threads, and abort a finished process now and then.
    """
    status, group = run(main), sys.modules.get("torch.distributed")
    if status == 0 and group.is_available() and group.is_initialized():
        group.destroy_process_group()
    atexit._run_exitfuncs()  # there is no public way to run what torch_npu and others want to do at the end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _describe(error):
    """Return a line about an error that nobody foresaw, with a hint or with the file of its traceback."""
    text = "{}: {}".format(type(error).__name__, (str(error).strip() or "no message").splitlines()[0])
    for pattern, hint in HINTS:
        if re.search(pattern, "{} {}".format(text, error), re.IGNORECASE | re.DOTALL):
            return "{} -- {}".format(text, hint)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="traceback-", suffix=".txt", delete=False) as file:
            traceback.print_exception(type(error), error, error.__traceback__, file=file)
        return "{} (traceback in {})".format(text, file.name)
    except OSError:  # the disk is full
        return text
