"""Errors that a user can cure: one line on the screen instead of a traceback, and the exit codes."""

import atexit
import errno
import os
import signal
import sys
import tempfile
import time
import traceback

from common.cures import cure

batch_size = None  # of the run; its loader sets it, for the advice when memory runs out


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


def say(text):
    """Print one line on standard error, naming the rank where there are several."""
    rank = os.environ.get("RANK")
    where = " rank {}:".format(rank) if rank is not None and os.environ.get("WORLD_SIZE") != "1" else ""
    over_live_line = "\r\033[K" if sys.stderr.isatty() else ""
    print("{}[Error]{} {}".format(over_live_line, where, printable(text)), file=sys.stderr, flush=True)


def run(main):
    """Call `main()` and return the exit status of the process; no exception becomes a traceback on the screen.

    An unexpected error leaves its traceback in a file that the line names.
    """
    try:
        return main() or 0
    except Stopped as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UserError as error:
        text = str(error)
    except Exception as error:
        text = _explain(error) or _unexpected(error)
    _let_rank_0_speak_first()
    say(text)
    return 1


def run_and_exit(main):
    """End the process with the status of `run(main)`.

    The destructors of native code are left out: with a process group still open, as after an error, they race its
    threads and abort the process now and then.
    """
    status = run(main)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _explain(error):
    """Return the line for an error that torch or the system puts in words of its own, or None."""
    text = "{}: {}".format(type(error).__name__, error).lower()
    smaller = "a smaller --batch-size"
    if batch_size and batch_size > 1:
        smaller = "--batch-size {} (--lr in proportion)".format(batch_size // 2)
    if "dataloader worker" in text or "no space left on device: </torch_" in text or "file </torch_" in text:
        if "killed by signal: killed" in text:
            return "a decoding process was killed (out of memory? see dmesg): fewer --workers, or " + smaller
        if "bus error" in text or "shared memory" in text or "no space left" in text:
            return "/dev/shm is full: fewer --workers, {}, or a container with --ipc=host or --shm-size".format(smaller)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "the machine has no memory left: fewer --workers, or " + smaller
    if any(words in text for words in ("out of memory", "outofmemory", "allocate memory", "not enough memory")):
        return "out of memory: try " + smaller
    if "gloo" in text and any(words in text for words in ("closed by peer", "reset by peer", "broken pipe")):
        return "another rank has ended; what it said tells why"
    return None


def _unexpected(error):
    """Return the line for `error`, and leave its traceback in a file."""
    first_line = (str(error).strip() or "no message").splitlines()[0]
    try:
        with tempfile.NamedTemporaryFile("w", prefix="traceback-", suffix=".txt", delete=False) as file:
            traceback.print_exception(type(error), error, error.__traceback__, file=file)
        where = "traceback in " + file.name
    except OSError as problem:
        where = "its traceback could not be kept: {}".format(problem.strerror)
    advice = cure(str(error))
    return "{}: {}{} ({})".format(type(error).__name__, first_line, advice and " -- " + advice, where)


def _let_rank_0_speak_first():
    # All ranks usually meet the same error: when rank 0 ends, the launcher ends the others before they repeat it.
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
