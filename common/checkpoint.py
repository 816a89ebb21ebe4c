"""Checkpoint files: written whole or not at all, read without ever running code, resumed where they stopped."""

import glob
import os
import tempfile
import time

import torch

from common.errors import UserError, printable

LAST = "checkpoint.pth.tar"
BEST = "model_best.pth.tar"


def add_arguments(parser):
    """Declare the options of saving and loading."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--resume", metavar="FILE", help="go on from this checkpoint; with --evaluate: measure it")
    group.add_argument("--pretrained", metavar="FILE", help="start from these weights (.pth, .pth.tar, .safetensors)")
    group.add_argument("-e", "--evaluate", action="store_true", help="measure the accuracy on val/, train nothing")
    group.add_argument("--output-dir", "--output_dir", metavar="DIR", help="folder of the checkpoints")
    group.add_argument("--save-steps", type=int, default=0, metavar="N", help="also save every N steps of an epoch")
    group.add_argument("--no-save", action="store_true", help="write no checkpoints")


def read(path):
    """Return what the file `path` holds, tensors on the CPU; code in the file is refused, not run.

    Raises:
        UserError: no such file, damaged, or more than tensors and plain values.
    """
    if not os.path.isfile(path):
        raise UserError("no checkpoint at {}".format(path))
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError("{}: pip install safetensors to read it".format(path)) from None
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        text = str(error)
        if "weights_only" in text or "Unsupported" in text:
            raise UserError("{} holds more than tensors and plain values; it is not loaded".format(path)) from None
        raise UserError("{} is damaged or no checkpoint ({})".format(path, text.splitlines()[0][:200])) from None


def write(state, path):
    """Write `state` to `path` so that, whatever happens, `path` is the old file or the new one, whole.

    Raises:
        OSError: the file could not be written; the old one is untouched.
    """
    temporary = "{}.tmp-{}".format(path, os.getpid())
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


class Checkpoints:
    """The checkpoints of a run: the last one, the one with the best accuracy, and where the run stands.

    Attributes:
        epoch: the epoch that runs or comes next, from 0.
        samples: how many samples of its order are done.
        best_acc1: the best Acc@1 in percent so far.
    """

    def __init__(self, device, args, log, default_folder, parts, facts):
        """Check that the folder can be written, on rank 0, and remove what a killed run left half-written.

        Args:
            device: the `common.device.Device`.
            args: `output_dir`, `no_save`, `resume`, `save_steps`.
            log: the `common.logger.Log`.
            default_folder: where `args.output_dir` is not given.
            parts: dict from name to what has a state: "state_dict" (the model), "optimizer", "precision", ...
            facts: dict of plain values that the file carries too ("arch", "classes", ...).

        Raises:
            UserError: the folder cannot be written.
        """
        self._device, self._log, self._parts, self._facts = device, log, parts, facts
        self.epoch, self.samples, self.best_acc1 = 0, 0, 0.0
        self.folder = os.path.abspath(args.output_dir or default_folder)
        self._save_steps = args.save_steps
        self._writes = device.ranks.is_main and not args.no_save
        # Files of the run that is resumed are its own; those of another run are kept aside.
        resumed_here = args.resume and os.path.dirname(os.path.abspath(args.resume)) == self.folder
        self._own = {LAST, BEST} if resumed_here else set()
        if self._writes:
            self._prepare_folder()

    def _prepare_folder(self):
        try:
            os.makedirs(self.folder, exist_ok=True)
            for stale in glob.glob(os.path.join(glob.escape(self.folder), "*.pth.tar.tmp-*")):
                os.remove(stale)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
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
            part.load_state_dict(content[name])
        self.epoch, self.samples, self.best_acc1 = content["epoch"], content["samples"], content["best_acc1"]
        self._log.last_checkpoint = path
        self._log.line("resumed {}: epoch {}, {} samples done".format(path, self.epoch, self.samples))

    def after_step(self, epoch):
        """Save when `--save-steps` says so, and when a signal asks for the end; `epoch` is the `logger.Epoch`."""
        self.epoch, self.samples = epoch.number, epoch.samples
        if self._save_steps and epoch.steps_done % self._save_steps == 0:
            with epoch.paused():
                self.save()
        self._device.ranks.check_stop(self.save)

    def after_epoch(self, epoch, acc1):
        """Save at the end of `epoch`, a `logger.Epoch`; `acc1` is its Acc@1 in percent, or None."""
        self.epoch, self.samples = (epoch.number + 1, 0) if epoch.is_complete else (epoch.number, epoch.samples)
        best = acc1 is not None and acc1 >= self.best_acc1
        if best:
            self.best_acc1 = acc1
        self.save(best)

    def save(self, best=False):
        """Write the last checkpoint, on rank 0, and with `best` also the best one."""
        if not self._writes:
            return
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state.update(self._facts, epoch=self.epoch, samples=self.samples, best_acc1=self.best_acc1)
        for name in (LAST, BEST) if best else (LAST,):
            path = os.path.join(self.folder, name)
            try:
                self._keep_aside(name, path)
                write(state, path)
            except OSError as error:
                raise UserError("{} could not be written: {}".format(path, error.strerror or error)) from None
            self._log.last_checkpoint = path

    def _keep_aside(self, name, path):
        if name not in self._own and os.path.exists(path):
            kept = "{}.prev-{}".format(path, time.strftime("%Y%m%d-%H%M%S"))
            os.rename(path, kept)
            self._log.line("{} of an earlier run is kept as {}".format(name, os.path.basename(kept)))
        self._own.add(name)


def _weights(content, path):
    """Return the flat state dict inside `content`, without wrappers and `module.` prefixes."""
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError("{} holds no state dict".format(path))
    if all(key.startswith("module.") for key in content):
        content = {key[len("module.") :]: value for key, value in content.items()}
    return dict(content)


def load_weights(model, content, path, convert, may_replace_head):
    """Load any official checkpoint of the network into `model`; return lines that say what was done.

    Args:
        model: the model; its `classifier_keys` are the prefixes of the layers whose size is the number of classes.
        content: what `read(path)` returned.
        path: for messages.
        convert: the bundle's `models.pretrained.convert(state, model) -> (state, notes)`, which translates the keys of
            other sources and raises ValueError for another network.
        may_replace_head: whether a head of another number of classes is left as initialised (fine-tuning).

    Raises:
        UserError: the weights are of another network, or of another number of classes.
    """
    state = _weights(content, path)
    try:
        state, notes = convert(state, model)
    except ValueError as error:
        raise UserError("{} does not fit: {}".format(path, error)) from None
    wanted = model.state_dict()
    for key in [key for key in state if key in wanted and state[key].shape != wanted[key].shape]:
        if not key.startswith(tuple(prefix + "." for prefix in model.classifier_keys)):
            raise UserError(
                "{} is of another network: {} is {}, not {}".format(
                    path, key, tuple(state[key].shape), tuple(wanted[key].shape)
                )
            )
        has, needs = state[key].shape[0], wanted[key].shape[0]
        if has == needs + 1 == 1001:
            state[key] = state[key][1:]
            notes.append("{}: dropped class 0 (background) of {}".format(key, has))
        elif may_replace_head:
            del state[key]
            notes.append("{}: {} classes in the file, {} here: starts fresh".format(key, has, needs))
        else:
            raise UserError("{} has {} classes, the data set has {}".format(path, has, needs))
    fresh = tuple(prefix + "." for prefix in model.classifier_keys) if may_replace_head else ()
    missing = [key for key in wanted if key not in state and not key.startswith(fresh)]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in wanted]
    if missing or unknown:
        raise UserError(
            "{} is of another network: {} weights are missing ({}), {} are unknown ({})".format(
                path, len(missing), printable(", ".join(missing[:3])), len(unknown), printable(", ".join(unknown[:3]))
            )
        )
    merged = dict(wanted)
    merged.update(state)
    model.load_state_dict(merged)
    return ["loaded {} of {} tensors from {}".format(len(state), len(wanted), path)] + notes
