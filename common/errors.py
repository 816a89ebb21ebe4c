"""Errors as one line instead of a traceback, the user's terminal, exit status, files written whole or not at all."""

import atexit
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback

ANOTHER_RANK = "another rank has ended, what it said tells why"
HINTS = (  # (pattern in the text of an error, what to do)
    ("memoryerror|(out of|allocate|enough) memory", "a smaller --batch-size (--lr in proportion) or fewer --workers"),
    ("more than 1 value per channel", "BatchNorm needs more numbers: a larger --batch-size or --image-size"),
    ("gloo.*(closed by peer|reset by peer|broken pipe)", ANOTHER_RANK),
    ("No backend type associated", "leave --dist-backend out: NPUs take hccl alone, CPUs gloo"),
    ("error code is 507(033|899)", "is the card healthy (npu-smi info), is its /dev/davinci* in the container?"),
    ("error code is 500001", "torch_npu and CANN do not fit each other: see the table of versions in README.md"),
    ("EI0006", "the cards cannot reach each other: firewall, HCCL_SOCKET_IFNAME, the same CANN everywhere"),
    ("EI0002", "a rank waited for the others: look for the rank that stopped first, then for HCCL_EXEC_TIMEOUT"),
    ("Cannot find bin of op", "CANN's kernels (ops) package of this chip is missing"),
    ("torchinductor.*file too short", "a run was killed while it compiled: delete that folder torchinductor_..."),
)


class UserError(Exception):
    """Something the user can put right; its text says what was wrong, where, and what to do."""


class Stopped(Exception):
    """The signal of this number asked for the end, and everything worth keeping has been saved."""


def refuse(error):
    """Raise UserError for the OSError `error` of a file or folder that cannot be read, as `os.walk` reports it."""
    raise UserError("{} cannot be read: {}".format(error.filename, error.strerror))


def printable(text):
    """Return `text` on one line, control characters replaced, so that no name can forge a line of a log."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def first_of(names):
    """Return the first of `names`, as text for a line."""
    return printable(", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))


def open_terminal():
    """Return the terminal that the user looks at as a text file, or None where there is none."""
    if sys.stdout.isatty():
        return sys.stdout
    with contextlib.suppress(KeyError, OSError):  # launch.sh sends the standard output to nohup.out
        # Without O_NOCTTY it could become the terminal whose Ctrl-C ends this process.
        return open(os.open(os.environ["LIVE_TERMINAL"], os.O_WRONLY | os.O_NOCTTY), "w", buffering=1)


def is_distributed():
    """Return whether this process is a rank that torchrun has started; pods set some of these, or LOCAL_RANK=0,1,2."""
    return all(os.environ.get(name, "").isdecimal() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def print_error(text):
    """Print one line on standard error, naming the rank where there are several."""
    rank = " rank {}:".format(os.environ["RANK"]) if is_distributed() and os.environ["WORLD_SIZE"] != "1" else ""
    over_live_line = "\r\033[K" if sys.stderr.isatty() else ""
    print("{}[Error]{} {}".format(over_live_line, rank, printable(text)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def replacing(path, data=None):
    """Yield the name of a file, of `data` if given, that takes the place of `path` when the caller has done with it."""
    name = "{}.tmp-{}".format(path, os.getpid())
    try:
        if data is not None:
            with open(name, "xb") as file:  # never through a link that lies there
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        yield name
        os.replace(name, path)
        with contextlib.suppress(OSError):  # where the file system can: else a power failure may undo it
            folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)


def write_atomic(path, data):
    """Replace the file `path` by the bytes `data`, whole or not at all; raises UserError where it cannot be written."""
    try:
        with replacing(path, data):
            pass
    except OSError as error:
        raise UserError("{} cannot be written: {}".format(path, error.strerror)) from None


def run(main):
    """Call `main()` and return the exit status of the process; no exception becomes a traceback on the screen."""
    try:
        return main() or 0
    except Stopped as stop:
        return 128 + stop.args[0]
    except BrokenPipeError:  # `... | head` has seen enough
        return 128 + signal.SIGPIPE
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else _describe(error)
        if is_distributed():  # the end of a rank ends the others: first the one with the cause, then local rank 0
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10 if ANOTHER_RANK in text else 5 * min(1, int(os.environ.get("LOCAL_RANK", 0))))
        print_error(text)
        return 1


def run_and_exit(main):
    """End the process with the status of `run(main)`, without destructors of native code: they may abort it."""
    status = run(main)
    atexit._run_exitfuncs()  # there is no public way to run what torch_npu and others want to do at the end
    with contextlib.suppress(OSError):  # a pipe whose reader has ended
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
            traceback.print_exc(file=file)
        return "{} (traceback in {})".format(text, file.name)
    except OSError:  # the disk is full
        return text
