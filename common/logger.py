"""The one writer of log lines: progress, throughput, results, and the machine-readable copy of all of them.

FPS is the number of images of all cards divided by the wall time between two synchronised log points. Waiting for data
counts; the first `SKIPPED_STEPS` steps, evaluations and checkpoints do not.
"""

import collections
import contextlib
import json
import math
import os
import time

import torch

from common.device import describe_environment
from common.errors import UserError, printable

INPUT_BOUND = 0.25  # share of the time spent waiting for data from which the log says so
JUDGED_STEPS = 20  # and after how many steps, since the workers may start slowly
SKIPPED_STEPS = 5  # of a run, or its first half: memory pools, kernels and workers are still being set up


def add_arguments(parser):
    """Declare the options of the log."""
    group = parser.add_argument_group("log")
    group.add_argument("-p", "--print-freq", type=int, default=10, metavar="N", help="steps between two log lines")
    group.add_argument("--log-dir", metavar="DIR", help="folder of train_<id>.log and metrics.jsonl (default: none)")
    group.add_argument("--log-id", default="0", metavar="ID", help="the <id> of these names")


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return "{}:{:02d}:{:02d}".format(minutes // 60, minutes % 60, seconds)


def count_correct(logits, targets):
    """Return int64 [3]: targets among the best 1 and 5 of `logits` [B, C], and how many targets there are.

    Negative targets (padding, unreadable images) are no target; fewer than 5 classes make all of them the best 5.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1)[1]
    hits = best == targets.unsqueeze(1)
    return torch.stack([hits[:, :1].sum(), hits.sum(), (targets >= 0).sum()])


class Log:
    """Writes the lines of a run on rank 0, and keeps the sums that the lines show."""

    def __init__(self, device, args, network):
        """Open the files.

        Args:
            device: the `common.device.Device`.
            args: `print_freq`, `log_dir`, `log_id`.
            network: the bundle's name for its network.

        Raises:
            UserError: the folder cannot be written.
        """
        self.device, self.network = device, network
        self.print_freq = max(1, args.print_freq)
        self._started = time.time()
        self._text = self._metrics = None
        if args.log_dir and device.ranks.is_main:
            try:
                os.makedirs(args.log_dir, exist_ok=True)
                self._text = open(os.path.join(args.log_dir, "train_{}.log".format(args.log_id)), "a", encoding="utf-8")
                self._metrics = open(os.path.join(args.log_dir, "metrics.jsonl"), "a", encoding="utf-8")
            except OSError as error:
                raise UserError("{}: {}".format(args.log_dir, error.strerror)) from None
        self._run_steps, self._skipped_steps = 0, None
        self._timed_images = self._timed_seconds = self._timed_steps = self._timed_wait = 0
        self._last_loss = self._best = None
        self._said_input_bound = False
        self.last_checkpoint = None

    def line(self, text):
        """Write one line to the screen and the log file, on rank 0."""
        if self.device.ranks.is_main:
            # Fields are separated by tabs; nothing else that moves the cursor may come from a name.
            text = "\t".join(printable(part) for part in text.split("\t"))
            print(text, flush=True)
            if self._text is not None:
                self._text.write(text + "\n")
                self._text.flush()

    def record(self, kind, **values):
        """Append one JSON object to metrics.jsonl, on rank 0."""
        if self._metrics is not None:
            self._metrics.write(
                json.dumps(dict(kind=kind, time=round(time.time() - self._started, 3), **values)) + "\n"
            )
            self._metrics.flush()

    def start(self, args, precision):
        """Write the line that says what runs: what `common.parse_log` needs beside the numbers."""
        facts = {
            "network": self.network,
            "arch": args.arch,
            "batch_size": args.batch_size,
            "rank_size": self.device.ranks.world_size,
            "device": self.device.type,
            "device_name": self.device.name,
            "data": "synthetic" if args.synthetic else args.data,
            "epochs": args.epochs,
            "precision": precision.label,
            "opt_level": args.opt_level if args.amp else "O0",
        }
        facts.update(describe_environment())
        for remark in self.device.remarks:
            self.line(remark)
        self.line("=> run " + json.dumps(facts, sort_keys=True))
        self.record("run", **facts)

    def train(self, loader, epoch, samples, args):
        """Return the `Epoch` that counts training epoch `epoch` from sample `samples` of its order on."""
        return Epoch(self, loader, epoch, samples, args.epochs, args.max_steps)

    def evaluation(self, epoch, loader, counts):
        """Write the accuracy line.

        Args:
            epoch: number of the epoch that was trained before.
            loader: the `input.Loader` of val/.
            counts: int64 [3] of `count_correct`, summed over all batches and ranks.

        Returns:
            (Acc@1, Acc@5) in percent of all images; an image that could not be read counts as wrong.
        """
        correct1, correct5, seen = counts.tolist()
        self._name_unreadable(loader)
        unreadable = len(loader.bad)
        assert seen + unreadable == len(loader), "{} of {} validation images were counted".format(seen, len(loader))
        acc1, acc5 = (100.0 * correct / len(loader) for correct in (correct1, correct5))
        self.line(" * Acc@1 {:.3f} Acc@5 {:.3f}".format(acc1, acc5))
        if unreadable:
            self.line("[Warning] {} validation images could not be read; they count as wrong".format(unreadable))
        self.record("eval", epoch=epoch, acc1=acc1, acc5=acc5, images=seen, unreadable=unreadable)
        if self._best is None or acc1 > self._best[0]:
            self._best = (acc1, acc5)
        return acc1, acc5

    def _name_unreadable(self, loader):
        while loader.unnamed:
            self.line("[Warning] {} cannot be read: {}".format(*loader.unnamed.pop(0)))

    def state_dict(self):
        """Return what a checkpoint must keep: the best (Acc@1, Acc@5) so far."""
        return {"best": self._best}

    def load_state_dict(self, state):
        """Take the best accuracy of the run that is resumed."""
        self._best = state["best"]

    def timed(self, images, seconds, steps, wait):
        """Add a stretch of training to the throughput of the run; say once that it waits for its data too long."""
        self._timed_images += images
        self._timed_seconds += seconds
        self._timed_steps += steps
        self._timed_wait += wait
        share = self._timed_wait / self._timed_seconds
        if share > INPUT_BOUND and self._timed_steps >= JUDGED_STEPS and not self._said_input_bound:
            self._said_input_bound = True
            self.line(
                "[Warning] waiting for data takes {:.0f} % of the time: raise --workers, or pack the data set "
                "(python -m common.pack --help)".format(100 * share)
            )

    def finish(self):
        """Write the last lines: throughput over the run, and the result as JSON."""
        result = {"e2e_seconds": round(time.time() - self._started, 3)}
        if self._timed_seconds:
            result["fps"] = self._timed_images / self._timed_seconds
            result["step_seconds"] = self._timed_seconds / self._timed_steps
            self.line(" * FPS@all {:.3f}, TIME@all {:.3f}".format(result["fps"], result["step_seconds"]))
        if self._last_loss is not None:
            result["loss"] = self._last_loss
        if self._best is not None:
            result["acc1"], result["acc5"] = self._best
        self.line("=> result " + json.dumps(result, sort_keys=True))
        self.record("result", **result)


class Epoch:
    """Counts one training epoch: `for images, targets in epoch:` and `epoch.step(...)` at the end of each step.

    Attributes:
        number: of the epoch, from 0.
        samples: how many samples of the epoch's order all ranks have taken, this step's included.
        progress: epochs done before this step, as a float: what learning-rate schedules are functions of.
    """

    def __init__(self, log, loader, number, samples, epochs, max_steps):
        self._log, self._loader, self._device = log, loader, log.device
        self._global_batch = loader.batch_size * loader.world
        self.number, self.samples, self.progress = number, samples, number + samples / len(loader)
        self._step = -(-samples // self._global_batch)  # fewer or more ranks may have done the first part
        self._steps = self._step + loader.steps_from(samples)
        left = max_steps - number * loader.steps if max_steps else self._steps
        self._last_step = min(self._steps, left)
        self._later_steps = (epochs - number - 1) * loader.steps
        if max_steps:
            self._later_steps = min(self._later_steps, left - self._last_step)
        if log._skipped_steps is None:
            log._skipped_steps = min(SKIPPED_STEPS, self._remaining() // 2)
        self._losses = []
        self._counts = None
        self._sums = collections.Counter()

    @property
    def steps_done(self):
        """Number of the epoch's steps that are done."""
        return self._step

    @property
    def is_complete(self):
        """Whether no step of the epoch is left."""
        return self._step >= self._steps

    @property
    def is_final(self):
        """Whether `--max-steps` ends the run with this epoch."""
        return self._later_steps <= 0

    def __iter__(self):
        """Yield (images, targets) of the steps that are left."""
        if self._step >= self._last_step:
            return
        self._mark()
        for images, targets in self._loader.batches(self.number, self.samples):
            self._log._name_unreadable(self._loader)
            self.progress = self.number + self.samples / len(self._loader)
            self._device.seed_step(self.number * len(self._loader) + self.samples)
            self.samples = min(self.samples + self._global_batch, len(self._loader))
            yield images, targets
            if self._step == self._last_step:
                return

    def _remaining(self):
        return self._last_step - self._step + self._later_steps

    def _mark(self):
        self._device.synchronize()
        self._since, self._since_wait = time.perf_counter(), self._loader.wait_seconds

    def step(self, loss, logits, targets, learning_rate):
        """Count a step; nothing waits for the device except at a log point.

        Args:
            loss: scalar tensor.
            logits: [B, C].
            targets: int64 [B].
            learning_rate: that of the step.

        Raises:
            UserError: at a log point, when a loss since the last one was not finite.
        """
        log = self._log
        self._losses.append(loss.detach())
        counts = count_correct(logits.detach(), targets)
        self._counts = counts if self._counts is None else self._counts + counts
        self._step += 1
        log._run_steps += 1
        if log._run_steps == log._skipped_steps or self._step % log.print_freq == 0 or self._step == self._last_step:
            self._report(learning_rate)

    def _report(self, learning_rate):
        device, log, sums = self._device, self._log, self._sums
        losses = torch.stack(self._losses).float()
        reduced = device.ranks.sum(torch.cat([losses, self._counts.float()]))
        values = reduced.tolist()  # waits for the device
        now, steps = time.perf_counter(), len(self._losses)
        losses = [value / device.ranks.world_size for value in values[:steps]]
        correct1, correct5, images = values[steps:]
        seconds, wait = now - self._since, self._loader.wait_seconds - self._since_wait
        self._losses, self._counts = [], None
        sums.update(loss=sum(losses), correct1=correct1, correct5=correct5, images=images, steps=steps, wait=wait)
        sums.update(seconds=seconds)
        if log._run_steps <= log._skipped_steps:
            if device.compiles:
                log.line("=> {} steps and their compilation took {:.1f} s, left out of FPS".format(steps, seconds))
        else:
            log.timed(images, seconds, steps, wait)
            sums.update(timed_images=images, timed_seconds=seconds)
        log._last_loss = losses[-1]
        self._check_finite(losses)
        fps = images / seconds
        fields = [
            "Epoch: [{}][{:4d}/{}]".format(self.number, self._step, self._steps),
            "Time {:6.3f} ({:6.3f})".format(seconds / steps, sums["seconds"] / sums["steps"]),
            "Data {:6.3f} ({:6.3f})".format(wait / steps, sums["wait"] / sums["steps"]),
            "Loss {:.4e} ({:.4e})".format(losses[-1], sums["loss"] / sums["steps"]),
            "Acc@1 {:6.2f} ({:6.2f})".format(100 * correct1 / images, 100 * sums["correct1"] / sums["images"]),
            "Acc@5 {:6.2f} ({:6.2f})".format(100 * correct5 / images, 100 * sums["correct5"] / sums["images"]),
            "LR {:.5g}".format(learning_rate),
            "FPS {:.2f} ({:.2f})".format(fps, sums["timed_images"] / max(sums["timed_seconds"], 1e-9) or fps),
            "ETA {}".format(_clock(self._remaining() * sums["seconds"] / sums["steps"])),
        ]
        log.line("\t".join(fields))
        log.record(
            "train", epoch=self.number, step=self._step, losses=losses, acc1=100 * correct1 / images, fps=fps,
            lr=learning_rate, data_seconds=wait / steps, step_seconds=seconds / steps, memory_gib=device.memory_gib(),
        )  # fmt: skip
        self._mark()

    def _check_finite(self, losses):
        if not all(math.isfinite(loss) for loss in losses):
            saved = self._log.last_checkpoint
            raise UserError(
                "the loss is not a finite number between steps {} and {} of epoch {}. {} Try a lower learning rate, "
                "a longer warm-up, or --opt-level O0.".format(
                    self._step - len(losses) + 1,
                    self._step,
                    self.number,
                    "The last checkpoint is {}.".format(saved) if saved else "No checkpoint was written yet.",
                )
            )

    @contextlib.contextmanager
    def paused(self):
        """Leave out of the throughput what happens inside (a checkpoint, say)."""
        self._device.synchronize()
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began
