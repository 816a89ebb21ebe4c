"""Errors that a user can cure: one line on the screen instead of a traceback, and the exit codes."""

import os
import signal
import sys
import tempfile
import time
import traceback


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
    print("[Error]{} {}".format(where, printable(text)), file=sys.stderr, flush=True)


def run(main):
    """Call `main()` and return the exit status of the process; no exception becomes a traceback on the screen.

    An unexpected error leaves its traceback in a file that the line names.
    """
    try:
        return main() or 0
    except UserError as error:
        _let_rank_0_speak_first()
        say(error)
        return 1
    except Stopped as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        _let_rank_0_speak_first()
        with tempfile.NamedTemporaryFile("w", prefix="traceback-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        first_line = (str(error).strip() or "no message").splitlines()[0]
        say("{}: {} (traceback in {})".format(type(error).__name__, first_line, file.name))
        return 1


def _let_rank_0_speak_first():
    # All ranks usually meet the same error: when rank 0 ends, the launcher ends the others before they repeat it.
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
