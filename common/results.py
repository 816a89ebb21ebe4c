"""The one reader of what a run leaves in its output folder, be it half-written, or an old script's."""

import fcntl
import glob
import json
import os
import re
import time

from common import files, old_logs

METRICS = "metrics.jsonl"
STARTING = 600  # seconds for which a silent run that has no metrics.jsonl yet is taken to be running
LAST_WORDS = re.compile(r"^(\[Error\].*|SIG[A-Z]+ in epoch .*|train_\w+ ended with status .*)", re.MULTILINE)
TRAIN_KEYS = {"epoch", "step", "steps", "loss", "losses", "acc1", "fps", "lr", "step_seconds"}


class Run:
    """One run, as far as its folder tells.

    Attributes:
        folder: its path.
        facts: what ran: "network", "rank_size", "batch_size" (per card), "device", "precision", "torch", "date", ...
        result: what came out at the end, empty without an end: "fps", "acc1", "loss", "e2e_seconds", ...
        train, evals: the records "train" and "eval" of metrics.jsonl (see `common.metrics`), in order.
        state: "complete", "running" or "failed".
        reason: why it failed, one line; else "".
    """

    def __init__(self, folder):
        parts = os.path.abspath(folder).split(os.sep)
        self.folder, self.state, self.reason = folder, "failed", ""
        self.facts = {"network": parts[-4] if parts[-3:-1] == ["test", "output"] else parts[-1]}
        self.result, self.train, self.evals = {}, [], []

    @property
    def name(self):
        """Network, cards and device, e.g. "MnasNet 8p-NPU"."""
        facts = self.facts
        return "{} {}p-{}".format(facts["network"], facts.get("rank_size", "?"), facts.get("device", "?").upper())

    @property
    def acc1(self):
        """The best Acc@1 in percent over val/, or None."""
        return max((record["acc1"] for record in self.evals), default=self.result.get("acc1"))

    @property
    def fps(self):
        """Images per second of all cards over the run, or None."""
        if "fps" in self.result:
            return self.result["fps"]
        timed = [(r["fps"], r["step_seconds"] * len(r["losses"])) for r in self.train[1:] if "step_seconds" in r]
        seconds = sum(seconds for _, seconds in timed)
        return sum(fps * seconds for fps, seconds in timed) / seconds if seconds else None

    @property
    def epochs(self):
        """What was trained: "90", "12.5/90" without an end, "1000 steps", or None for an evaluation."""
        if not self.train:
            return None
        done, wanted = progress(self.train[-1]), self.facts.get("epochs")
        if self.state != "complete":
            return "{:.1f}/{}".format(done, wanted or "?")
        if wanted and done < wanted and "losses" in self.train[-1]:
            return "{} steps".format(sum(len(record["losses"]) for record in self.train))
        return str(self.train[-1]["epoch"] + 1)


def progress(record):
    """Return the epochs done at a record of `Run.train`, a float."""
    return record["epoch"] + record["step"] / record["steps"]


def find(path):
    """Return the folders of runs at `path`: itself, or those below it."""
    if _is_run(path):
        return [path]
    below = ("*", "output/*", "test/output/*", "*/test/output/*")
    folders = {folder for pattern in below for folder in glob.glob(os.path.join(glob.escape(path), pattern))}
    return sorted(folder for folder in folders if _is_run(folder))


def _is_run(folder):
    in_output = os.path.basename(os.path.dirname(os.path.abspath(folder))) == "output"
    return bool(files.find(folder, METRICS, "train_*.log", *["nohup.out"] * in_output))  # nohup leaves one anywhere


def read(folder):
    """Return the `Run` of `folder`, however little of it there is.

    Raises:
        OSError: a file cannot be read.
    """
    run = Run(folder)
    path = os.path.join(folder, METRICS)
    if os.path.isfile(path):
        _read_metrics(path, run)
        is_running = _is_locked(path)
    else:
        old_logs.read(folder, run)
        run.reason = run.reason or _last_words(folder)
        newest = max(os.path.getmtime(path) for path in files.find(folder, "*"))
        is_running = not run.reason and time.time() - newest < STARTING
    if run.result and not run.reason:
        run.state = "complete"
    elif is_running:
        run.state = "running"
    else:
        run.reason = run.reason or _last_words(folder) or "no end, and no word why: killed?"
    return run


def _read_metrics(path, run):
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                kind = record.pop("kind")
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # half a line, of a process that was killed or that writes it now
            if kind == "run":
                run.facts.update(record)
                run.result = {}
            elif kind == "result":
                run.result = record
            elif kind == "train" and set(record) >= TRAIN_KEYS:
                run.train.append(record)
            elif kind == "eval":
                run.evals.append(record)


def _is_locked(path):
    """Return whether the process that writes `path` is alive: it holds a lock."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # this file system has no locks
        return False


def _last_words(folder):
    """Return the last line that says why a run ended, or ""."""
    words = []
    for path in files.find(folder, "train_*.log", "nohup.out"):
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            words += LAST_WORDS.findall(file.read().decode("utf-8", "replace"))
    errors = [line for line in words if line.startswith("[Error]")]
    return (errors or words or [""])[-1]
