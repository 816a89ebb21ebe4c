"""Checkpoint files: written whole or not at all, and resumed where they stopped.

A run keeps its last checkpoint, the one before it, and the best. All are complete: any of them can be resumed.
"""

import copy
import io
import os
import signal
import tempfile

import torch

from common import files
from common.errors import UserError
from common.safe_load import read

LAST = "checkpoint.pth.tar"
PREVIOUS = "checkpoint.prev.pth.tar"
BEST = "model_best.pth.tar"
NAMES = (LAST, PREVIOUS, BEST)  # newest first
AUTO = "auto"


def add_arguments(parser):
    """Declare the options of saving and loading."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--resume", metavar="FILE|auto", help="go on from FILE, or from the newest of --output-dir; see --evaluate"
    )
    group.add_argument("--pretrained", metavar="FILE", help="start from these weights (.pth, .pth.tar, .safetensors)")
    group.add_argument("-e", "--evaluate", action="store_true", help="measure --resume FILE on val/, train nothing")
    group.add_argument("--output-dir", "--output_dir", metavar="DIR", help="folder of the checkpoints")
    group.add_argument("--save-steps", type=int, default=0, metavar="N", help="also save every N steps of an epoch")
    group.add_argument("--on-save-error", default="stop", choices=["stop", "continue"], help="when the disk is full")
    group.add_argument("--no-save", action="store_true", help="write no checkpoints")


def load(device, args, log, default_folder):
    """Return what the file that `--resume` or `--pretrained` names holds, or None without one.

    `--resume auto` becomes the path of the newest valid checkpoint, or None. Ranks that torch's elastic launcher has
    started again take the newest checkpoint that this run has written, if there is one.

    Raises:
        UserError: the file cannot be read, or `auto` finds only damaged ones.
    """
    content = None
    if device.ranks.is_main:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if args.resume == AUTO or restarted:
            folder = _folder(args, default_folder)
            path, content = _newest(folder, log, run=_run_id() if restarted else None)
            if path or args.resume == AUTO:
                args.resume = path
            if path is None:
                log.line("no checkpoint to go on from in {}: starting afresh".format(folder))
    args.resume = device.ranks.gather_on_host(args.resume)[0]  # all ranks take the file that rank 0 has chosen
    path = args.resume or args.pretrained
    return read(path) if content is None and path else content


def _folder(args, default_folder):
    return os.path.abspath(args.output_dir or default_folder)


def _run_id():
    """Return what tells this run from others, the same after a restart by torch's elastic launcher; else None."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return run and "{} {}".format(run, os.getppid())


def _newest(folder, log, run=None):
    """Return (path, content) of the newest checkpoint in `folder` (that `run` has written), or (None, None)."""
    damaged = []
    for name in NAMES:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            content = read(path)
        except UserError as error:
            log.line("[Warning] {}".format(error))
            damaged.append(name)
            continue
        if run is not None and content.get("run") != run:
            continue
        if damaged:
            log.line("[Warning] going on from {} instead of {}".format(name, damaged[0]))
        return path, content
    if damaged and run is None:
        raise UserError("no valid checkpoint in {}; move {} away to start afresh".format(folder, ", ".join(damaged)))
    return None, None


class Checkpoints:
    """The checkpoints of a run: the last ones, the one with the best accuracy, and where the run stands.

    Attributes:
        epoch: the epoch that runs or comes next, from 0.
        samples: how many samples of its order are done.
        best_acc1: the best Acc@1 in percent so far.
    """

    def __init__(self, device, args, log, default_folder, parts, facts):
        """Check that the folder can be written, on rank 0, and remove what a killed run left half-written.

        From here on SIGTERM, SIGINT and SIGHUP no longer end the process at once: it saves first.

        Args:
            device: the `common.device.Device`.
            args: `output_dir`, `no_save`, `evaluate`, `resume`, `save_steps`, `on_save_error`.
            log: the `common.logger.Log`.
            default_folder: where `args.output_dir` is not given.
            parts: dict from name to what has a state: "state_dict" (the model), "optimizer", "precision", ...
            facts: dict of plain values that the file carries too ("arch", "classes", ...).

        Raises:
            UserError: the folder cannot be written, or another run writes its checkpoints there.
        """
        self._log, self._parts, self._facts = log, dict(parts, log=log), dict(facts, run=_run_id())
        self.epoch, self.samples, self.best_acc1 = 0, 0, 0.0
        self._saved = self._position
        self.folder = _folder(args, default_folder)
        self._save_steps, self._on_save_error = args.save_steps, args.on_save_error
        self._writes = device.ranks.is_main and not args.no_save and not args.evaluate
        # The file that is resumed and older ones are this run's own; newer ones, and another run's, are kept aside.
        folder, name = os.path.split(os.path.abspath(args.resume or ""))
        resumed_here = folder == self.folder and name in NAMES
        self._own = set(NAMES[NAMES.index(name) :] if resumed_here else ())
        if self._writes:
            self._prepare_folder()
        device.ranks.catch_signals(self._stop)

    @property
    def _position(self):
        return self.epoch, self.samples

    def _path(self, name):
        return os.path.join(self.folder, name)

    def _prepare_folder(self):
        try:
            os.makedirs(self.folder, exist_ok=True)
            files.lock(self.folder)
            for name in NAMES:
                path = self._path(name)
                if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
                    raise UserError("{} is no ordinary file: move it away, or give another --output-dir".format(path))
                files.remove_stale(path)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except BlockingIOError:
            raise UserError(
                "another run writes its checkpoints to {}: give this one another --output-dir".format(self.folder)
            ) from None
        except OSError as error:
            raise UserError("checkpoints cannot be written to {}: {}".format(self.folder, error.strerror)) from None

    def resume(self, content, path):
        """Take everything from `content`, which `read(path)` returned, and go on where it stopped.

        Raises:
            UserError: it is no checkpoint of this network, or has other classes.
        """
        missing = [name for name in ("epoch", "samples", "best_acc1", *self._parts) if name not in content]
        if missing:
            raise UserError(
                "{} has no {}: it cannot be resumed; --pretrained takes its weights".format(path, ", ".join(missing))
            )
        if content.get("arch") != self._facts["arch"]:
            raise UserError("{} is of {}, not {}".format(path, content.get("arch"), self._facts["arch"]))
        if content.get("classes") != self._facts["classes"]:
            raise UserError("{} was trained on other classes: --pretrained takes its weights".format(path))
        for name, part in self._parts.items():
            try:
                part.load_state_dict(_in_the_form_of(part, content[name]))
            except Exception as error:  # each part complains in its own way
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError("{} cannot be resumed: its {} does not fit ({})".format(path, name, reason)) from None
        self.epoch, self.samples, self.best_acc1 = content["epoch"], content["samples"], content["best_acc1"]
        self._saved = self._position
        self._log.last_checkpoint = path
        self._log.line("resumed {}: epoch {}, {} samples done".format(path, self.epoch, self.samples))

    def after_step(self, epoch):
        """Note where `epoch`, a `logger.Epoch`, stands, and save when `--save-steps` says so."""
        self.epoch, self.samples = epoch.number, epoch.samples
        if self._save_steps and epoch.steps_done % self._save_steps == 0:
            with epoch.paused():
                self.save()

    def after_epoch(self, epoch, acc1):
        """Save at the end of `epoch`, a `logger.Epoch`; `acc1` is its Acc@1 in percent, or None."""
        self.epoch, self.samples = (epoch.number + 1, 0) if epoch.is_complete else (epoch.number, epoch.samples)
        best = acc1 is not None and acc1 >= self.best_acc1
        if best:
            self.best_acc1 = acc1
        self.save(best)

    def _stop(self, signum):
        self.save()
        saved = self._log.last_checkpoint
        where = "--resume {} goes on from there".format(saved) if saved else "nothing was saved"
        self._log.line(
            "{} in epoch {}, {} samples done: {}".format(signal.Signals(signum).name, self.epoch, self.samples, where)
        )

    def save(self, best=False):
        """Write the last checkpoint, on rank 0, unless nothing has changed since; with `best` also the best one.

        Raises:
            UserError: the weights are not finite, or the files cannot be written and `--on-save-error` is "stop".
        """
        if not self._writes or (self._position == self._saved and not best):
            return
        state = {name: _on_cpu(part.state_dict()) for name, part in self._parts.items()}
        state.update(self._facts, epoch=self.epoch, samples=self.samples, best_acc1=self.best_acc1)
        if not all(torch.isfinite(t).all() for t in state["state_dict"].values() if t.is_floating_point()):
            kept = self._log.last_checkpoint
            raise UserError(
                "the weights are not finite numbers and are not saved; {}. Try a lower learning rate, a longer "
                "warm-up, or --opt-level O0".format("the last checkpoint is " + kept if kept else "nothing is saved")
            )
        try:
            self._write(state, best)
        except OSError as error:
            text = "no checkpoint could be written to {}: {}; the files there are as they were".format(
                self.folder, error.strerror or error
            )
            if self._on_save_error == "stop":
                raise UserError(text + " (--on-save-error continue trains on)") from None
            self._log.line("[Warning] {}, training goes on".format(text))
            return
        self._saved = self._position
        self._log.last_checkpoint = self._path(LAST)

    def _write(self, state, best):
        """Replace the files; whatever happens, each is the old or the new one, whole.

        Raises:
            OSError: a file could not be written.
        """
        data = io.BytesIO()
        torch.save(state, data)
        temporary = files.write_beside(self._path(LAST), data.getbuffer())
        try:
            # The best one first: after a kill in between, the epoch that the last one repeats writes it again.
            if best:
                self._keep_aside(BEST)
                files.link(temporary, self._path(BEST))
            if LAST in self._own and os.path.isfile(self._path(LAST)):
                files.link(self._path(LAST), self._path(PREVIOUS))
            self._keep_aside(LAST, PREVIOUS)
            os.replace(temporary, self._path(LAST))
        finally:
            files.remove(temporary)
        files.sync(self.folder)

    def _keep_aside(self, *names):
        """Rename files of another run before the first of ours takes their place."""
        for name in names:
            kept = None if name in self._own else files.keep_aside(self._path(name))
            if kept:
                self._log.line("{} of an earlier run is kept as {}".format(name, os.path.basename(kept)))
            self._own.add(name)


def _on_cpu(value):
    """Return `value` with its tensors on the CPU: a file must open where there is no card of this kind."""
    if torch.is_tensor(value):
        return value.detach().cpu()
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, and with the versions that a model's state dict carries
        copied.update((key, _on_cpu(item)) for key, item in value.items())
        return copied
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value


def _in_the_form_of(part, state):
    """Return an optimizer's `state` in the form of this device and this torch: a file of others may have another."""
    groups = getattr(part, "param_groups", ())
    if len(groups) == 0 or len(groups) != len(state["param_groups"]):
        return state
    forms = ({key: group[key] for key in ("fused", "foreach", "capturable") if key in group} for group in groups)
    state = dict(state, param_groups=[dict(saved, **form) for saved, form in zip(state["param_groups"], forms)])
    if "foreach" not in groups[0]:  # old torch, whose steps are plain numbers; newer ones make tensors of them
        plain = {n: dict(s, step=int(s["step"])) if "step" in s else s for n, s in state["state"].items()}
        state.update(state=plain)
    return state
