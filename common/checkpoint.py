"""Checkpoint files: written whole or not at all, and resumed where they stopped."""

import argparse
import contextlib
import fcntl
import glob
import io
import os
import signal
import tempfile
import time

import torch

from common import arguments
from common.errors import Stopped, UserError
from common.weights import on_cpu, read

# The last checkpoint, the one before it, and the best: each is complete and can be resumed.
LAST, PREVIOUS, BEST = NAMES = ("checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar")
# Tells this run, on this node, from others; a restart by torch's elastic launcher keeps it.
RUN = "{} {} {}".format(os.environ.get("TORCHELASTIC_RUN_ID"), os.uname().nodename, os.getppid())
PLACES = ("resume", "pretrained", "output_dir", "log_dir", "log_id")  # options that may always differ from the file's


def keep_previous(path):
    """Rename what is at `path`, if anything, to <path>.prev-<time>, and return its new name, else None."""
    kept = path + time.strftime(".prev-%Y%m%d-%H%M%S")
    while os.path.lexists(kept):
        kept += "x"
    if not os.path.lexists(path):
        return None
    os.rename(path, kept)
    return kept


def _lock(folder):
    """Hold `folder` until this process ends; raise BlockingIOError where another one has it.

    A run that was killed a moment ago may hold it a little longer.
    """
    handle, deadline = os.open(folder, os.O_RDONLY), time.time() + 5  # never closed: that would end the lock
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.time() > deadline:
                raise
            time.sleep(0.1)
        except OSError:
            return None  # this file system has no locks


@contextlib.contextmanager
def _temporary(path):
    """Yield the name of a file that is to replace `path`; if it is still there in the end, it is removed."""
    name = "{}.tmp-{}".format(path, os.getpid())
    try:
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)


def _sync(path):
    """Wait until the file or folder `path` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_new(path, data):
    with open(path, "xb") as file:  # never through a link that lies there
        file.write(data)
    _sync(path)


def write_atomic(path, data):
    """Replace the file `path` by the bytes `data`, whole or not at all; raises OSError."""
    with _temporary(path) as temporary:
        _write_new(temporary, data)
        os.replace(temporary, path)
    _sync(os.path.dirname(os.path.abspath(path)))


def _link(source, target):
    """Replace `target` by a second name of the file `source`, or by a copy where the file system has no links."""
    with _temporary(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, "rb") as file:
                _write_new(temporary, file.read())
        os.replace(temporary, target)


def load(parser, argv, args, architectures, network_options, folder):
    """Read the file of `--resume` or `--pretrained`; where the command line is silent, it decides about the network.

    `auto` is the newest valid checkpoint of `--output-dir` or `folder`. Ranks that torch's elastic launcher has started
    again take the newest that this run has written. Every rank chooses by itself.

    `args` is what `arguments.parse(parser, argv)` returned; the defaults of `parser` change. `--arch` has to be one of
    `architectures`; `network_options` are attributes of `args` without which the weights mean another network.

    Return (args, content): new options, with `resume` a path or None, and what the file holds, None without one. Raise
    UserError where the file cannot be used, or the command line of a resumed training contradicts it.
    """
    is_auto, content, notices = args.resume == "auto", None, []
    path, trains = None if is_auto else args.resume, not (args.evaluate or args.export or args.predict)
    if is_auto or (trains and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"):
        folder = os.path.abspath(args.output_dir or folder)
        newest, content = _newest(folder, notices, None if is_auto else RUN)
        path = newest or path
        if path is None:
            notices.append("no checkpoint to go on from in {}: starting afresh".format(folder))
    resume = path or (None if trains else args.pretrained)  # a network that is only used keeps its head
    path = path or args.pretrained
    if path and content is None:
        content = read(path)
    if path and isinstance(content.get("arch"), str) and isinstance(content.get("args"), dict):  # a bundle wrote it
        if content["arch"] not in architectures:
            raise UserError("{} is of {}, which this bundle does not have".format(path, content["arch"]))
        names = ["arch", *network_options] + ["num_classes"] * bool(resume)
        known = {name: value for name, value in dict(content["args"], arch=content["arch"]).items() if name in names}
        parser.set_defaults(**known)
        before, args = args, arguments.parse(parser, argv)
        for name, value in known.items():
            own, option = getattr(args, name), "--" + name.replace("_", "-")
            if own != value and resume and trains and name != "num_classes":  # the lists of classes are compared later
                text = "{} was trained with {} {}, not {}: leave {} out, or start another run with --pretrained"
                raise UserError(text.format(path, option, value, own, option))
            if own != getattr(before, name):
                notices.append("{} {}, as in {}".format(option, value, path))
    if not trains:
        notices += filter(None, [arguments.unused(parser, args, network_options)])
    return argparse.Namespace(**dict(vars(args), resume=resume, notices=args.notices + notices)), content


def _newest(folder, notices, run):
    """Return (path, content) of the newest valid checkpoint in `folder` (with `run`: of that run), or (None, None)."""
    damaged = []
    for name in [name for name in NAMES if os.path.isfile(os.path.join(folder, name))]:
        try:
            content = read(os.path.join(folder, name))
        except UserError as error:
            notices.append("[Warning] {}".format(error))
            damaged.append(name)
            continue
        if run is None or run in (content.get("run") or ()):
            if damaged:
                notices.append("[Warning] going on from {} instead of {}".format(name, damaged[0]))
            return os.path.join(folder, name), content
    if damaged and run is None:
        raise UserError("no valid checkpoint in {}; move {} away to start afresh".format(folder, ", ".join(damaged)))
    return None, None


class Checkpoints:
    """The checkpoints of a run, and where it stands: in `epoch`, from 0, of whose order `samples` are done."""

    def __init__(self, card, args, log, folder, parts, metadata):
        """Check that rank 0 can write to `folder`, and remove what a killed run left half-written.

        The files carry the states of `parts` ("state_dict": the model, "optimizer", "precision", "log", ...), the plain
        values of `metadata` ("classes", and "order": `Loader.order_facts`), and `args`. Raises UserError where the
        folder cannot be written, another run writes to it, or only some ranks have a file to resume.
        """
        self._ranks, self._args, self._log, self._parts = card.ranks, args, log, parts
        self.folder, self.epoch, self.samples, self._steps, self._saved = os.path.abspath(folder), 0, 0, 0, (0, 0)
        self._check_same(bool(args.resume))
        runs = sorted(set(self._ranks.all_gather(RUN)))
        self._metadata = dict(metadata, arch=args.arch, args=arguments.as_dict(args), run=runs)
        self._last, self._previous, self._best = files = [os.path.join(self.folder, name) for name in NAMES]
        # The file that is resumed and older ones are this run's own; newer ones, and another run's, will be renamed.
        resumed = os.path.abspath(args.resume or "")
        self._foreign = files[: files.index(resumed)] if resumed in files else files
        self._writes = card.ranks.is_rank0 and not args.no_save
        if self._writes:
            self._prepare_folder(files)
        log.when_stopped(self._stop)

    def _check_same(self, value):
        if any(other != value for other in self._ranks.all_gather(value)):
            raise UserError("the ranks resume different files: give each node what is in {}".format(self.folder))

    def _prepare_folder(self, files):
        try:
            os.makedirs(self.folder, exist_ok=True)
            _lock(self.folder)
            for path in files:
                for stale in glob.glob(glob.escape(path) + ".tmp-*"):
                    os.remove(stale)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except BlockingIOError:
            text = "another run writes its checkpoints to {}: give this one another --output-dir"
            raise UserError(text.format(self.folder)) from None
        except OSError as error:
            raise UserError("checkpoints cannot be written to {}: {}".format(self.folder, error.strerror)) from None

    def resume(self, content, path):
        """Take everything from `content`, which `read(path)` returned, and go on where it stopped.

        Raises UserError where it is no whole checkpoint, has other classes, or stands within an epoch of another order.
        """
        old, new = content.get("order", {}), self._metadata["order"]
        missing = [name for name in ("epoch", "samples", *self._parts) if name not in content]
        if missing:
            text = "{} has no {}: it cannot be resumed; --pretrained takes its weights"
            raise UserError(text.format(path, ", ".join(missing)))
        self.epoch, self.samples = self._saved = content["epoch"], content["samples"]
        self._check_same(list(self._saved))
        if content.get("classes") != self._metadata["classes"]:
            raise UserError("{} was trained on other classes: --pretrained takes its weights".format(path))
        changed = _differences(old, new)
        if changed and self.samples == old["images"] > 0:
            self.samples = new["images"]  # the epoch is done
        elif changed and self.samples:
            text = "{} stands within an epoch whose samples came in another order ({}): go on with the same --seed and "
            raise UserError(text.format(path, changed) + "train/, or start another run with --pretrained")
        for name, part in self._parts.items():
            try:
                part.load_state_dict(_with_options_of(part, content[name]))
            except Exception as error:  # each part complains in its own way
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError("{} cannot be resumed: its {} does not fit ({})".format(path, name, reason)) from None
        self._log.last_checkpoint = path
        self._log.line("resumed {}: epoch {}, {} samples done".format(path, self.epoch, self.samples))
        changed = _differences(dict(content.get("args", {}), **old), dict(self._metadata["args"], **new))
        if changed:
            self._log.line("other options than the checkpoint's run: {}".format(changed))

    def after_step(self, batch, stop_signal):
        """Note that `batch` (a `data.Batch`) is done; save for `--save-steps`; for a signal save and raise Stopped."""
        self.samples, self._steps = batch.samples, self._steps + 1
        if self._args.save_steps and self._steps % self._args.save_steps == 0:
            self._save()
        if stop_signal:
            self._stop(stop_signal)
            self._ranks.barrier()  # the launcher ends all ranks when one has ended
            raise Stopped(stop_signal)

    def before_evaluation(self):
        """Save, so that there is nothing to save when a signal ends the evaluation."""
        if self._log.is_complete:
            self.samples = self._metadata["order"]["images"]  # also those that were too few for a last batch
        self._save()

    def after_epoch(self, acc1):
        """Save at the end of an epoch; `acc1` is its Acc@1 in percent, or None."""
        if self._log.is_complete:
            self.epoch, self.samples, self._steps = self.epoch + 1, 0, 0
        self._save(best=acc1 is not None and acc1 >= self._log.best_acc1)

    def _stop(self, signum):
        self._save()
        saved, name = self._log.last_checkpoint, signal.Signals(signum).name
        where = "--resume {} goes on from there".format(saved) if saved else "nothing was saved"
        self._log.line("{} in epoch {}, {} samples done: {}".format(name, self.epoch, self.samples, where))

    def _save(self, best=False):
        """Write the last checkpoint, on rank 0, unless nothing has changed since; with `best` also the best one."""
        position = self.epoch, self.samples
        if not self._writes or (position == self._saved and not best):
            return
        with self._log.paused():
            state = {name: on_cpu(part.state_dict()) for name, part in self._parts.items()}
            if not all(torch.isfinite(t).all() for t in state["state_dict"].values() if t.is_floating_point()):
                text = "the weights are not finite numbers and are not saved (the last checkpoint: {}). Try a lower "
                text += "learning rate, a longer warm-up, or --opt-level O0"
                raise UserError(text.format(self._log.last_checkpoint))
            state.update(self._metadata, epoch=self.epoch, samples=self.samples, best_acc1=self._log.best_acc1)
            data = io.BytesIO()
            torch.save(state, data)
            try:
                self._replace_files(data.getbuffer(), best)
            except OSError as error:
                text = "no checkpoint could be written to {}: {}; the files there are as they were"
                text = text.format(self.folder, error.strerror or error)
                if self._args.on_save_error == "stop":
                    raise UserError(text + " (--on-save-error continue trains on)") from None
                return self._log.line("[Warning] {}, training goes on".format(text))
        self._saved, self._log.last_checkpoint = position, self._last

    def _replace_files(self, data, best):
        with _temporary(self._last) as temporary:
            _write_new(temporary, data)
            for path in self._foreign:
                kept = keep_previous(path)
                if kept:
                    self._log.line("{} of an earlier run is kept as {}".format(path, os.path.basename(kept)))
            self._foreign = ()
            if best:  # first: after a kill in between, the epoch that the last one repeats writes it again
                _link(temporary, self._best)
            if os.path.isfile(self._last):
                _link(self._last, self._previous)
            os.replace(temporary, self._last)
        _sync(self.folder)


def _differences(old, new):
    """Return "name old -> new, ..." of the options that both dicts have and that differ."""
    names = [name for name in old if name in new and name not in PLACES and old[name] != new[name]]
    return ", ".join("{} {} -> {}".format(name, old[name], new[name]) for name in names)


def _with_options_of(part, state):
    """Return an optimizer's `state` with the options that `part` has here: the command line's, and this device's."""
    groups = getattr(part, "param_groups", ())
    if len(groups) == 0 or len(groups) != len(state["param_groups"]):
        return state
    saved = [group["params"] for group in state["param_groups"]]
    state = dict(state, param_groups=[dict(group, params=params) for group, params in zip(groups, saved)])
    if "foreach" not in groups[0]:  # old torch, whose steps are plain numbers; newer ones make tensors of them
        plain = {n: dict(s, step=int(s["step"])) if "step" in s else s for n, s in state["state"].items()}
        state.update(state=plain)
    return state
