"""The live line: on a terminal one line that shows where an epoch stands, rewritten in place; elsewhere nothing."""

import atexit
import contextlib
import os
import sys

try:
    import tqdm
except ImportError:
    tqdm = None

WIDE = (
    "Epoch {epoch}/{epochs} |{{bar}}| {{n}}/{{total}}  loss {loss:.4f}  Acc@1 {acc1:.2f}  FPS {fps:.1f}  LR {lr:.4g}  "
    "data {wait:.0%}  {memory:.1f} GiB  ETA {left}, run {run_left}{skipped}"
)
NARROW = (
    "{epoch}/{epochs} {{n}}/{{total}}{{bar}} loss {loss:.2f} acc {acc1:.1f} {fps:.0f}/s lr {lr:.2g} data {wait:.0%} "
    "{small_memory}G {left}/{run_left}{skipped}"
)
SMALLEST_BAR = 5  # columns


def open_terminal():
    """Return the terminal that the user looks at as a text file, or None where there is none."""
    if sys.stdout.isatty():
        return sys.stdout
    path = os.environ.get("LIVE_TERMINAL")  # launch.sh sends the standard output to nohup.out
    with contextlib.suppress(OSError):
        # Without O_NOCTTY it could become the terminal whose Ctrl-C ends this process.
        return open(os.open(path, os.O_WRONLY | os.O_NOCTTY), "w") if path else None


def short_time(seconds):
    """Return e.g. "48s", "12m05s", "3h07m" or "2d04h"."""
    seconds = int(seconds)
    for unit, below, name, small in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if seconds >= unit:
            return "{}{}{:02d}{}".format(seconds // unit, name, seconds % unit // below, small)
    return "{}s".format(seconds)


class LiveLine:
    """One line of a terminal that an epoch rewrites, with all other lines above it.

    Attributes:
        remarks: lines for the log: why there is no live line although there is a terminal.
    """

    def __init__(self, terminal):
        """Take `terminal`, a text file or None: then all methods do nothing."""
        self._terminal, self._bar = terminal, None
        self.remarks = []
        atexit.register(self.stop)  # after an error: the shell's prompt does not belong on this line
        if terminal is not None and tqdm is None:
            self.remarks.append("tqdm is not installed: plain lines in place of a live line (pip install tqdm)")

    def start(self, title, step, steps):
        """Begin an epoch of `steps` steps of which `step` are done."""
        self.stop()
        if self._terminal is None or tqdm is None:
            return
        tqdm.tqdm.monitor_interval = 0  # no thread beside the forks of the data loader
        self._bar = tqdm.tqdm(
            total=steps, initial=step, file=self._terminal, dynamic_ncols=True, mininterval=0.5,
            bar_format=title + " |{bar}| {n}/{total}",
        )  # fmt: skip

    def step(self):
        """Count one step; the terminal is written to twice a second at most."""
        if self._bar is not None:
            self._bar.update()

    def show(self, **values):
        """Show new numbers: the fields of `WIDE`, where they fit, else of `NARROW`."""
        if self._bar is None:
            return
        width = self._bar.format_dict["ncols"] or 80
        small_memory = "{:.{}f}".format(values["memory"], 0 if values["memory"] >= 10 else 1)
        for form in (WIDE, NARROW):
            text = form.format(small_memory=small_memory, **values)
            shown = text.format(bar="", n=self._bar.n, total=self._bar.total)
            if len(shown) + SMALLEST_BAR <= width:
                break
        self._bar.bar_format = text
        self._bar.refresh()

    def write(self, text, live=False):
        """Write one line above the live line, unless `live` says that the live line tells the same."""
        if self._terminal is None or (live and self._bar is not None):
            return
        with contextlib.suppress(OSError):  # a terminal that was closed is no reason to end a training
            if self._bar is not None:
                self._bar.write(text, file=self._terminal)
            else:
                print(text, file=self._terminal, flush=True)

    def stop(self, leave=True):
        """End the line; what follows begins below it, or with `leave` False in its place."""
        if self._bar is not None:
            self._bar.leave = leave
            self._bar.close()
            self._bar = None
