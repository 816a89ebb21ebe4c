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
from common.distributed import set_buffers
from common.errors import Stopped, UserError, replacing
from common.weights import on_cpu, read

# The last checkpoint, the one before it, and the best: each is complete and can be resumed.
NAMES = ("checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar")
# Tells this run, on this node, from others; a restart by torch's elastic launcher keeps it.
RUN = "{} {} {}".format(os.environ.get("TORCHELASTIC_RUN_ID"), os.uname().nodename, os.getppid())
PLACES = ("resume", "pretrained", "output_dir", "log_dir", "log_id")  # options that may always differ from the file's


def keep_previous(path):
    """Rename what is at `path`, if anything, to <path>.prev-<time>; return its new name, or None."""
    kept = path + time.strftime(".prev-%Y%m%d-%H%M%S")
    while os.path.lexists(kept):
        kept += "x"
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, kept)
        return kept


def _link(source, target):
    """Replace `target` by a second name of the file `source`, or by a copy where the file system has no links."""
    try:
        with replacing(target) as temporary:
            os.link(source, temporary)
    except OSError:
        with open(source, "rb") as file, replacing(target, file.read()):
            pass


def lock(folder, content, option):
    """Hold `folder` until this process ends. A run that was killed a moment ago may hold it a little longer."""
    handle = os.open(folder, os.O_RDONLY)  # never closed: that would end the lock
    for _ in range(50):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return None  # this file system has no locks
    raise UserError("another run writes its {} to {}: give this one another {}".format(content, folder, option))


def load(parser, argv, args, architectures, network_options, folder):
    """Return (args, content): the options, and what the file of `--resume` or `--pretrained` holds, None without one.

    Where `argv` is silent the file decides about `--arch` and `network_options`. Raises UserError where the file cannot
    be used, or `argv` contradicts it and the training goes on.
    """
    notices, trains = [], not (args.evaluate or args.export or args.predict)
    path, content = _find_resumed(args, trains, os.path.abspath(args.output_dir or folder), notices)
    resume = path or (None if trains else args.pretrained)  # a network that is only used keeps its head
    if path is None and args.pretrained:
        path, content = args.pretrained, read(args.pretrained)
    if path and isinstance(content.get("args"), dict) and content.get("arch") in architectures:  # this bundle wrote it
        others = [] if resume else ["num_classes", "eval_ema"]  # fine-tuning has classes and an average of its own
        others += ["eval_ema"] * ("state_dict_ema" not in content)  # nothing was averaged
        names = [name for name in ("arch", *network_options, "num_classes") if name not in others]
        recorded = dict(content["args"], arch=content["arch"])
        known = {name: recorded[name] for name in names if name in recorded}
        parser.set_defaults(**known)
        before, args = args, arguments.parse(parser, argv)
        for name, value in known.items():
            own, option = getattr(args, name), "--" + name.replace("_", "-")
            if own != value and resume and trains and name != "num_classes":  # the lists of classes are compared later
                text = "{} was trained with {} {}, not {}: leave {} out, or start another run with --pretrained"
                raise UserError(text.format(path, option, value, own, option))
            if own != getattr(before, name):
                notices.append("{} {}, as in {}".format(option, value, path))
    return argparse.Namespace(**dict(vars(args), resume=resume, notices=args.notices + notices)), content


def _find_resumed(args, trains, folder, notices):
    """Return (path, content) of the file to go on from, or (None, None).

    `--resume auto` is the newest valid checkpoint in `folder`; ranks that torch's launcher has started again take the
    newest of their run.
    """
    is_auto = args.resume == "auto"
    is_restart = trains and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    for name in NAMES if is_auto or is_restart else ():
        path = os.path.join(folder, name)
        try:
            content = read(path) if os.path.isfile(path) else None
            if content and (is_auto or RUN in content.get("run", ())):
                return path, content
        except UserError as error:
            notices.append("[Warning] {}: going on from an older one".format(error))
    if is_auto and notices:
        raise UserError("no valid checkpoint in {}; move the damaged ones away to start afresh".format(folder))
    if args.resume and not is_auto:
        return args.resume, read(args.resume)
    if is_auto or is_restart:
        notices.append("no checkpoint to go on from in {}: starting afresh".format(folder))
    return None, None


class Checkpoints:
    """The checkpoints of a run, and where it stands: in `epoch`, from 0, of whose order `samples` are done."""

    def __init__(self, card, args, log, folder, parts, metadata):
        """Make sure that rank 0, and no other run, can write to `folder`; raises UserError.

        The files carry the states of `parts` ("state_dict": the model, "optimizer", "precision", "log", ...), the plain
        values of `metadata` ("classes", and "order": `Loader.order_facts`), and `args`.
        """
        self._ranks, self._args, self._log, self._parts = card.ranks, args, log, parts
        self._models = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        self._folder, self.epoch, self.samples, self._saved = os.path.realpath(folder), 0, 0, (0, 0)
        runs = sorted(set(self._ranks.all_gather(RUN)))
        self._metadata = dict(metadata, arch=args.arch, args=arguments.as_dict(args), run=runs)
        self._last, self._previous, self._best = files = [os.path.join(self._folder, name) for name in NAMES]
        # The file that is resumed and older ones are this run's own; newer ones, and another run's, will be renamed.
        resumed = os.path.realpath(args.resume or "")
        self._foreign = files[: files.index(resumed)] if resumed in files else files
        self._writes = card.ranks.is_rank0 and not args.no_save
        log.when_stopped(self._stop)
        try:
            if self._writes:
                os.makedirs(self._folder, exist_ok=True)
                if not args.log_dir or os.path.realpath(args.log_dir) != self._folder:  # which the log holds
                    lock(self._folder, "checkpoints", "--output-dir")
                for stale in [stale for path in files for stale in glob.glob(glob.escape(path) + ".tmp-*")]:
                    os.remove(stale)
                tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise UserError("checkpoints cannot be written to {}: {}".format(self._folder, error.strerror)) from None

    def resume(self, content):
        """Go on where `content`, which the file of `--resume` holds, stopped; without `--resume` start afresh.

        Raises UserError where it is no whole checkpoint, has other classes, or stands within an epoch of another order,
        and where the ranks do not go on from the same step.
        """
        if self._args.resume:
            self._restore(content, self._args.resume)
        position = [self.epoch, self.samples, content.get("log", {}).get("began") if self._args.resume else 0]
        if any(other != position for other in self._ranks.all_gather(position)):
            raise UserError("the ranks resume different files: give each node what is in {}".format(self._folder))

    def _restore(self, content, path):
        missing = [name for name in ("epoch", "samples", *self._parts) if name not in content]
        if missing:
            raise UserError("{} has no {}: --pretrained takes its weights".format(path, ", ".join(missing)))
        if content.get("classes") != self._metadata["classes"]:
            raise UserError("{} was trained on other classes: --pretrained takes its weights".format(path))
        self.epoch, self.samples = self._saved = content["epoch"], content["samples"]
        old, new = content.get("order", {}), self._metadata["order"]
        changed = _differences(old, new)
        if changed and self.samples:
            if self.samples != old["images"]:
                text = "{} stands within an epoch whose samples came in another order ({}): keep --seed and train/"
                raise UserError(text.format(path, changed))
            self.samples = new["images"]  # the epoch is done
        for name, part in self._parts.items():
            try:
                part.load_state_dict(_with_options_of(part, content[name]))
                for param, state in getattr(part, "state", {}).items():  # fused steps read both in the order of memory
                    for key in [key for key, value in state.items() if getattr(value, "shape", None) == param.shape]:
                        state[key] = torch.empty_like(param).copy_(state[key])
            except Exception as error:  # each part complains in its own way
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError("{} cannot be resumed: its {} does not fit ({})".format(path, name, reason)) from None
        for model, values in zip(self._models, content.get("rank_buffers", ())):
            if len(values) == self._ranks.world_size:
                set_buffers(model, values[self._ranks.rank])
        self._log.last_checkpoint = path
        self._log.line("resumed {}: epoch {}, {} samples done".format(path, self.epoch, self.samples))
        changed = _differences(dict(content.get("args", {}), **old), dict(self._metadata["args"], **new))
        if changed:
            self._log.line("other options than the checkpoint's run: {}".format(changed))

    def after_step(self, batch, stop_signal):
        """Note that `batch` (a `data.Batch`) is done; save for `--save-steps`; for a signal save and raise Stopped."""
        if not batch.ends_step:
            return
        self.samples = batch.samples
        if self._log.is_save_point:
            self._save()
        if stop_signal:
            self._stop(stop_signal, is_alone=False)
            with contextlib.suppress(RuntimeError):  # of torch 1.8: the store ends with rank 0
                self._ranks.all_gather("saved")  # the launcher ends all ranks when one has ended
            raise Stopped(stop_signal)

    def before_evaluation(self):
        """Save, so that there is nothing to save when a signal ends the evaluation."""
        if self._log.is_complete:
            self.samples = self._metadata["order"]["images"]  # also those that were too few for a last batch
        self._save()

    def after_epoch(self, acc1):
        """Save at the end of an epoch; `acc1` is its Acc@1 in percent, or None."""
        if self._log.is_complete:
            self.epoch, self.samples = self.epoch + 1, 0
        self._save(best=acc1 is not None and acc1 >= self._log.best_acc1)

    def _stop(self, signum, is_alone=True):
        self._save(is_alone=is_alone)
        saved, name = self._log.last_checkpoint, signal.Signals(signum).name
        where = "--resume {} goes on from there".format(saved) if saved else "nothing was saved"
        self._log.line("{} in epoch {}, {} samples done: {}".format(name, self.epoch, self.samples, where))

    def _save(self, best=False, is_alone=False):
        """Write the last checkpoint, on rank 0, unless nothing has changed since; with `best` also the best one.

        `is_alone`: the other ranks are elsewhere, and do not give the BatchNorm statistics with which they would go on.
        """
        if self._log.is_complete or not best:  # else an evaluation within the epoch has averaged them
            self._buffers = [] if is_alone else [self._ranks.gather_buffers(model) for model in self._models]
        position = self.epoch, self.samples
        if not self._writes or (position == self._saved and not best):
            return
        with self._log.paused():
            state = {name: on_cpu(part.state_dict()) for name, part in self._parts.items()}
            if not all(torch.isfinite(t).all() for t in state["state_dict"].values() if t.is_floating_point()):
                text = "the weights are not finite numbers and are not saved (the last checkpoint: {}). Try a lower "
                raise UserError((text + "learning rate, or --opt-level O0").format(self._log.last_checkpoint))
            state.update(self._metadata, epoch=self.epoch, samples=self.samples, best_acc1=self._log.best_acc1)
            state["rank_buffers"] = [on_cpu(values) for values in self._buffers if values]
            data = io.BytesIO()
            torch.save(state, data)
            try:
                self._replace_files(data.getbuffer(), best)
            except OSError as error:
                text = "no checkpoint could be written to {}: {}".format(self._folder, error.strerror or error)
                if self._args.on_save_error == "stop":
                    raise UserError(text + " (--on-save-error continue trains on)") from None
                return self._log.line("[Warning] {}, training goes on".format(text))
        self._saved, self._log.last_checkpoint = position, self._last

    def _replace_files(self, data, best):
        with replacing(self._last, data) as temporary:
            for kept in filter(None, map(keep_previous, self._foreign)):
                self._log.line("a checkpoint of an earlier run is kept as {}".format(kept))
            self._foreign = ()
            if best:  # first: after a kill in between, the epoch that the last one repeats writes it again
                _link(temporary, self._best)
            if os.path.isfile(self._last):
                _link(self._last, self._previous)


def _differences(old, new):
    """Return "name old -> new, ..." of the options that both dicts have and that differ."""
    names = [name for name in old if name in new and name not in PLACES and old[name] != new[name]]
    return ", ".join("{} {} -> {}".format(name, old[name], new[name]) for name in names)


def _with_options_of(part, state):
    """Return an optimizer's `state` with the options that `part` has here: the command line's, and this device's."""
    groups = getattr(part, "param_groups", None)
    if not groups:
        return state
    kept = [dict(group, params=saved["params"]) for group, saved in zip(groups, state["param_groups"])]
    state = dict(state, param_groups=kept)
    if "foreach" not in groups[0]:  # old torch, torch_npu: their steps are plain numbers, not tensors
        state["state"] = {n: dict(s, step=int(s["step"])) if "step" in s else s for n, s in state["state"].items()}
    return state
