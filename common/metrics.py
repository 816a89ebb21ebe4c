"""metrics.jsonl of a run, and what is made of it while it grows: TensorBoard's files and curves.png.

One JSON object a line; its "kind" says what it is: "run" (what runs, at each start), "train" (the steps since the one
before), "eval", "result" (the end). A resumed run's file begins with what the checkpoint's run had written up to it,
so no step stands there twice. An older file of the folder is kept as metrics.jsonl.prev-<time>.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import time

from common import curves, files, results

PICTURE_SHARE = 0.05  # of a run's time, at the most, that goes into drawing


class Metrics:
    """Writes metrics.jsonl, and its copies for the eye; without a folder, nothing."""

    def __init__(self, folder, tensorboard, say):
        """Open the file.

        Args:
            folder: where it goes, or None.
            tensorboard: also write TensorBoard's files there.
            say: called with a line for the log.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder, self._say = folder and os.path.abspath(folder), say
        self._file, self._started = None, time.time()
        self._board, self._wants_board, self._total_step = None, tensorboard, 0
        self._wants_picture, self._next_picture = True, 0.0
        if folder is not None:
            path = os.path.join(folder, results.METRICS)
            files.keep_aside(path)
            self._file = open(path, "w+b", buffering=0)
            with contextlib.suppress(OSError):  # this file system has no locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells readers that the run goes on

    def record(self, kind, **values):
        """Append one JSON object of `kind`."""
        if self._file is None:
            return
        values = dict(kind=kind, time=round(time.time() - self._started, 3), **values)
        try:
            self._file.write(json.dumps(values).encode() + b"\n")
        except OSError as error:  # a full disk: the training is worth more than its record
            self._file = None
            self._say("[Warning] {} ends here: {}".format(results.METRICS, error.strerror))
        if kind == "train":
            self._total_step = values["epoch"] * values["steps"] + values["step"]
        if self._wants_board and kind in ("train", "eval"):
            self._add_to_board({"train": "train/", "eval": "val/"}[kind], values)

    def _add_to_board(self, prefix, values):
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                self._wants_board = False
                return self._say("no TensorBoard files: {} (pip install tensorboard)".format(error))
            # What an earlier run wrote of later steps into the same folder is not shown.
            self._board = SummaryWriter(self._folder, purge_step=self._total_step)
        for key in ("loss", "acc1", "acc5", "fps", "lr", "data_seconds", "memory_gib"):
            if key in values:
                self._board.add_scalar(prefix + key, values[key], self._total_step)
        return self._board.flush()

    def draw(self, end=False):
        """Draw curves.png, but leave it out where drawing takes too much of the time, unless it is the `end`."""
        if self._file is None or not self._wants_picture or (time.time() < self._next_picture and not end):
            return
        began = time.time()
        try:
            curves.draw([results.read(self._folder)], os.path.join(self._folder, curves.NAME))
        except Exception as error:  # whatever a library that only draws comes up with
            self._wants_picture = False
            hint = " (pip install matplotlib)" if isinstance(error, ImportError) else ""
            self._say("no {}: {}{}".format(curves.NAME, error, hint))
        now = time.time()
        self._next_picture = now + (now - began) / PICTURE_SHARE

    def state_dict(self):
        """Return what a checkpoint must keep so that its resumed run finds this history."""
        if self._file is None:
            return None
        content = self._content()
        return {"folder": self._folder, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def _content(self):
        self._file.seek(0)
        return self._file.read()

    def load_state_dict(self, state):
        """Put in front what the run that is resumed had written when it saved the checkpoint."""
        if self._file is None or state is None:
            return
        # launch.sh renames the folder of an earlier run, and we its file.
        for folder in (self._folder, state["folder"]):
            for path in glob.glob("{}*/{}*".format(glob.escape(folder), results.METRICS)):
                history = b""
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    history = file.read(state["bytes"])
                if hashlib.sha256(history).hexdigest() == state["sha256"]:
                    history += self._content()
                    self._file.seek(0)
                    self._file.write(history)
                    return
        self._say("{} of {} is gone: this one begins here".format(results.METRICS, state["folder"]))
