"""The log of a run: its lines, FPS, the live line of a terminal, and metrics.jsonl.

FPS is the number of images of all cards divided by the wall time between two synchronised log points. Waiting for data
counts; the first `UNTIMED_STEPS` steps of a run, those of `--profile`, evaluations and checkpoints do not.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

from common import arguments, checkpoint, errors
from common.distributed import STOP_SIGNALS
from common.errors import Stopped, UserError, printable

UNTIMED_STEPS = 5  # of a run, or its first half: memory pools, kernels and workers are still being set up
SYNC_SECONDS = 2  # of training, at the most, until all ranks know of a signal or a bad image of one of them
METRICS = "metrics.jsonl"
PROGRESS = (
    "Epoch: [{epoch}][{step:4d}/{steps}]\tTime {now[step_seconds]:6.3f} ({mean[step_seconds]:6.3f})\t"
    "Data {now[data_seconds]:6.3f} ({mean[data_seconds]:6.3f})\tLoss {loss:.4e} ({mean[loss]:.4e})\t"
    "Acc@1 {now[acc1]:6.2f} ({mean[acc1]:6.2f})\tAcc@5 {now[acc5]:6.2f} ({mean[acc5]:6.2f})\t"
    "LR {lr:.5g}\tETA {left}\tFPS {now[fps]:.2f} ({mean[fps]:.2f})"
)
LIVE = "loss {mean[loss]:.2f} acc {mean[acc1]:.1f} {now[fps]:.0f}/s LR {lr:.2g} ETA {left}"


def find_correct(logits, targets):
    """Return bool [B, 3]: whether the target is the best of `logits` [B, C], among the best 5, and a target at all.

    Negative targets (padding, unreadable images) are none; with fewer than 5 classes all are best; NaN is wrong.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1)[1]
    hits = (best == targets.unsqueeze(1)) & ~torch.isnan(logits).any(dim=1, keepdim=True)
    return torch.stack([hits[:, 0], hits.any(dim=1), targets >= 0], dim=1)


def count_classes(logits, targets):
    """Return int64 [C, 3]: of the targets of each class, how often `find_correct` is true."""
    is_of_class = targets.unsqueeze(1) == torch.arange(logits.shape[1], device=targets.device)
    return (is_of_class.float().t() @ find_correct(logits, targets).float()).long()  # exact: the sums are small


def _averages(sums):
    """Return what a log line shows of sums over steps: means of an image or a step, and images per second."""
    means = {name: sums[name] / sums["images"] for name in ("loss", "acc1", "acc5")}
    means.update({name: sums[name] / sums["steps"] for name in ("step_seconds", "data_seconds")})
    return dict(means, fps=sums["images"] / sums["step_seconds"])


class Log:
    """Writes the log of a run, on rank 0, and counts its steps.

    `is_complete` says that no step of the epoch is left, `is_final` that the run ends with it, `is_save_point` that
    `--save-steps` wants a checkpoint after this step; `last_checkpoint` is the path of the last one that was written or
    resumed, or None.
    """

    def __init__(self, card, args, network):
        """Open the files of `--log-dir`, or raise UserError; `network` is the bundle's name for its network."""
        self._card, self._ranks, self._args, self._network = card, card.ranks, args, network
        # A run that is resumed keeps the time at which it began: it tells its part of metrics.jsonl from another run's.
        self._started = self._began = float(os.environ.get("SCRIPT_STARTED") or time.time())
        self._resumes = bool(args.resume) and not args.evaluate
        self._best, self._speed, self.last_checkpoint, self._save = (), {}, None, lambda signum: None
        self._timed, self._untimed_steps, self._skipped, self._position = Counter(), None, 0, None
        self._files, self._full, self._text = {}, set(), "train_{}.log".format(args.log_id)
        self._terminal = errors.open_terminal() if card.ranks.is_rank0 else None
        if args.log_dir and card.ranks.is_rank0:
            try:
                os.makedirs(args.log_dir, exist_ok=True)
                checkpoint.lock(args.log_dir, "log", "--log-dir")
                if not self._resumes:
                    checkpoint.keep_previous(os.path.join(args.log_dir, METRICS))
                for name in (self._text, METRICS):
                    self._files[name] = open(os.path.join(args.log_dir, name), "a", encoding="utf-8")
            except OSError as error:
                raise UserError("--log-dir {}: {}".format(error.filename, error.strerror)) from None

    def _write(self, name, text):
        try:
            if name in self._files:
                print(text, file=self._files[name], flush=True)
                self._full.discard(name)
        except OSError as error:  # a full disk: the training is worth more than its log, which may go on later
            if name not in self._full:
                self._full.add(name)
                self.line("[Warning] {} cannot be written now: {}".format(name, error.strerror))

    def line(self, text, is_progress=False):
        """Write one line, on rank 0; `is_progress`: not to a terminal, whose live line tells the same."""
        if not self._ranks.is_rank0:
            return
        # Fields are separated by tabs; nothing else that moves the cursor may come from a name.
        text = "\t".join(printable(part) for part in text.split("\t"))
        if self._terminal is not None and not is_progress:
            with contextlib.suppress(OSError):  # a terminal that was closed is no reason to end a training
                tqdm.write(text, file=self._terminal)
        if self._terminal is not sys.stdout:
            with contextlib.suppress(OSError):  # nor is a pipe whose reader has ended, as `tee` does at Ctrl-C
                print(text, flush=True)
        self._write(self._text, text)

    def _record(self, kind, **values):
        """Append an object of `kind` "run", "train", "eval" or "result" to metrics.jsonl."""
        self._write(METRICS, json.dumps(dict(kind=kind, time=round(time.time() - self._started, 3), **values)))

    def start(self, args, precision):
        """Write what was chosen for the user, and what runs; `precision` is the `common.precision.Precision`."""
        self._precision = precision
        for notice in args.notices:
            self.line(notice)
        facts = {name: getattr(args, name) for name in ("arch", "batch_size", "epochs", "opt_level")}
        facts.update((name, sys.modules[name].__version__) for name in ("torch", "torch_npu") if name in sys.modules)
        facts.update(python=platform.python_version(), machine=platform.machine(), network=self._network)
        facts.update(rank_size=self._ranks.world_size, device=self._card.type, device_name=self._card.name)
        facts["global_batch"] = args.batch_size * self._ranks.world_size * (1 if args.evaluate else args.accumulate)
        facts.update(precision=precision.label, data="synthetic" if args.synthetic else args.data)
        facts["date"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._started))
        self.line("=> run " + json.dumps(facts, sort_keys=True))
        self._place = "{device_name} x {rank_size}, {batch_size} images, {precision}".format(**facts)
        self._facts = dict(facts, args=arguments.as_dict(args))
        if not self._resumes:  # else `load_state_dict` knows when it began
            self._record("run", began=self._began, **self._facts)

    def when_stopped(self, save):
        """Have `save(signum)` called where a signal ends the wait for a batch, or an evaluation."""
        self._save = save

    def _show(self, batches, title, total, done=0, is_training=False):
        """Yield `batches`; a live line of the terminal, if there is one, shows how many steps of `total` are done."""
        tqdm.monitor_interval = 0  # no thread beside the forks of the data loader
        options = {"initial": done, "file": self._terminal, "disable": self._terminal is None, "dynamic_ncols": True}
        form = title + " {n}/{total} |{bar}|{postfix}"
        try:
            with tqdm(total=total, leave=is_training, bar_format=form, **options) as self._bar:
                for batch in batches:
                    yield batch
                    self._bar.update(batch.ends_step)
                    if self._ranks.stop_signal and not is_training:  # there `step` tells all ranks of it
                        raise Stopped(self._ranks.stop_signal)
        except Stopped as stop:  # also while it waited for a batch
            if is_training and self._ranks.world_size == 1 and (self._losses or self._since_sync):
                self._sync()
                self._report()
            self._save(stop.args[0])
            raise

    def steps(self, loader, number, samples):
        """Return the batches that are left of training epoch `number` after `samples` samples; `step` follows each."""
        args, self._loader, self._number = self._args, loader, number
        self._step = loader.steps - loader.steps_from(samples)  # another number of ranks may have done the first part
        run_steps = min(args.epochs * loader.steps, args.max_steps or math.inf)
        self._run_end = max(self._step, run_steps - number * loader.steps)  # counted from this epoch's start, too
        self._end = min(loader.steps, self._run_end)
        self.is_complete, self.is_final = self._step == loader.steps, self._run_end == self._end
        is_first = self._untimed_steps is None
        if is_first:
            self._untimed_steps = min(UNTIMED_STEPS + args.profile, (self._run_end - self._step) // 2)
        self._epoch, self._since_log, self._losses = Counter(), Counter(), []
        self._parts, self._since_sync, self._sync_every, self._stop_signal = [], [], 1, 0
        self._card.synchronize()
        self._synced, self._waited = time.perf_counter(), loader.wait_seconds
        batches = itertools.islice(loader.batches(number, samples), (self._end - self._step) * args.accumulate)
        if is_first and args.profile and self._ranks.is_rank0:
            steps = min(max(1, self._untimed_steps), self._end - self._step)
            batches = self._card.profile(batches, steps, min(args.profile, steps), args, self)
        return self._show(batches, "{}/{}".format(number, args.epochs), self._end, self._step, is_training=True)

    def step(self, loss, logits, batch, learning_rate):
        """Count a batch with `loss` (scalar, the mean of this rank) and `logits` [B, C]; return 0 or a signal to stop.

        The signal is the same on all ranks. Nothing waits for the device except at log points and, with several ranks,
        every `SYNC_SECONDS`; there UserError is raised where a loss was not finite or too many images are bad.
        """
        loss, is_alone = loss.detach().float().reshape(1) * batch.weight, self._ranks.world_size == 1
        # Each rank has a place of its own: a sum of several losses rounds by where they lie among those of other steps.
        loss = torch.nn.functional.pad(loss, (self._ranks.rank, self._ranks.world_size - self._ranks.rank - 1))
        self._parts.append(torch.cat([loss, find_correct(logits.detach(), batch.targets).sum(dim=0).float()]))
        if not batch.ends_step:
            return 0
        self._since_sync.append(functools.reduce(torch.add, self._parts))
        self._parts = []
        self._step, self._untimed_steps = self._step + 1, self._untimed_steps - 1
        self.is_complete = self._step == self._loader.steps
        self.is_save_point = self._step % (self._args.save_steps or math.inf) == 0
        is_log_point = self._step % self._args.print_freq == 0 or self._step == self._end or self._untimed_steps == 0
        is_log_point = is_log_point or self.is_save_point  # else a run that goes on from there would lack these losses
        has_news = self._loader.new_bad or self._ranks.stop_signal
        if is_log_point or (has_news if is_alone else len(self._since_sync) >= self._sync_every):
            self._sync()
        self._learning_rate = learning_rate
        if is_log_point or self._stop_signal:
            self._report()
        return self._stop_signal

    def _sync(self):
        """Add up what all ranks have done since the last time, and share their signals and bad images."""
        self._card.synchronize()
        now, loader, world, steps = time.perf_counter(), self._loader, self._ranks.world_size, len(self._since_sync)
        own = [(now - self._synced) * self._ranks.is_rank0, len(loader.new_bad)]  # a checkpoint stops rank 0's clock
        own += [self._ranks.stop_signal == signum for signum in STOP_SIGNALS]
        own = torch.tensor(own, dtype=torch.float32, device=self._card.torch_device)
        sums = self._ranks.sum(torch.cat([own, *self._since_sync])).cpu()
        seconds, new_bad, *signals = sums[: len(own)].tolist()
        self._since_log.update(steps=steps, step_seconds=seconds, data_seconds=loader.wait_seconds - self._waited)
        for *losses, right1, right5, images in sums[len(own) :].view(steps, world + 3).tolist():
            self._losses.append(sum(losses) / world)
            self._since_log.update(images=images, loss=self._losses[-1] * images, acc1=100 * right1, acc5=100 * right5)
        self._since_sync, self._synced, self._waited = [], now, loader.wait_seconds
        self._sync_every = max(1, int(SYNC_SECONDS * steps / seconds))
        self._stop_signal = next((signum for signum, count in zip(STOP_SIGNALS, signals) if count), 0)
        for text in loader.share_bad() if new_bad else ():
            self.line("[Warning] " + text)
        if not math.isfinite(self._since_log["loss"]):
            text = "the loss is not a finite number between steps {} and {} of epoch {} (the last checkpoint: {}). "
            text += "Try a lower learning rate, a longer warm-up, or --opt-level O0"
            saved = self.last_checkpoint or "none yet"
            raise UserError(text.format(self._step - steps + 1, self._step, self._number, saved))

    def _report(self):
        """Write the steps since the last log point: to the log, to metrics.jsonl, on the live line."""
        sums, losses = self._since_log, self._losses
        self._since_log, self._losses = Counter(), []
        self._epoch.update(sums)
        now, mean = _averages(sums), _averages(self._epoch)
        mean["fps"] = now["fps"]
        if self._untimed_steps < 0:
            self._timed.update(sums)
            timed = _averages(self._timed)
            self._speed = {"fps": timed["fps"], "step_seconds": timed["step_seconds"], "loss": losses[-1]}
            mean["fps"] = timed["fps"]
        seconds = int((self._run_end - self._step) * mean["step_seconds"])
        left = "{}:{:02d}:{:02d}".format(seconds // 3600, seconds // 60 % 60, seconds % 60)
        place = {"epoch": self._number, "step": self._step, "steps": self._loader.steps, "lr": self._learning_rate}
        self._position = self._number + self._step / self._loader.steps  # in epochs, as `parse_log.progress`
        self.line(PROGRESS.format(now=now, mean=mean, loss=losses[-1], left=left, **place), is_progress=True)
        self._bar.set_postfix_str(LIVE.format(now=now, mean=mean, left=left, lr=self._learning_rate))
        old, self._skipped = self._skipped, int(self._precision.skipped)
        if self._skipped > old:
            self.line("skipped {} steps: a gradient overflowed ({} so far)".format(self._skipped - old, self._skipped))
        self._record("train", losses=losses, memory_gib=self._card.memory_gib(), skipped=self._skipped, **place, **now)

    @contextlib.contextmanager
    def paused(self):
        """Leave out of the throughput what happens inside (a checkpoint, say)."""
        self._card.synchronize()
        began = time.perf_counter()
        yield
        self._synced += time.perf_counter() - began

    def batches(self, loader):
        """Return an iterator over the batches of val/ for this rank; it raises Stopped when a signal has come."""
        return self._show(loader.batches(), "val/", loader.steps)

    def evaluation(self, epoch, loader, counts):
        """Write the accuracy after `epoch`; return (Acc@1, Acc@5) in percent of all images, unreadable ones wrong.

        `counts` is the int64 [C, 3] of `count_classes`, summed over this rank's batches of `loader`. Raises UserError
        where `--per-class` cannot be written, Stopped where a signal has ended another rank.
        """
        try:
            counts = self._ranks.sum(counts)
        except Stopped as stop:
            self._save(stop.args[0])
            raise
        correct1, correct5, seen = counts.sum(dim=0).tolist()
        for text in loader.share_bad():
            self.line("[Warning] " + text)
        unreadable = len(loader.bad)
        assert seen + unreadable == len(loader), "{} of {} validation images were counted".format(seen, len(loader))
        acc1, acc5 = 100 * correct1 / len(loader), 100 * correct5 / len(loader)
        self.line(" * Acc@1 {:.3f} Acc@5 {:.3f}".format(acc1, acc5))
        if unreadable:
            self.line("[Warning] {} validation images could not be read; they count as wrong".format(unreadable))
        self._record("eval", epoch=epoch, acc1=acc1, acc5=acc5, images=seen, unreadable=unreadable)
        if self._args.per_class and self._ranks.is_rank0:
            table, right, names = io.StringIO(), counts[:, 0].tolist(), loader.images.classes
            numbers = sorted(Counter(loader.images.targets.tolist()).items())
            rows = [[names[i], n, right[i], "{:.3f}".format(100 * right[i] / n)] for i, n in numbers]
            csv.writer(table, lineterminator="\n").writerows([["class", "images", "correct", "Acc@1"], *rows])
            errors.write_atomic(self._args.per_class, table.getvalue().encode("utf-8", "surrogateescape"))
        self._best = max(self._best, (acc1, acc5))
        return acc1, acc5

    @property
    def best_acc1(self):
        """The best Acc@1 of the run so far in percent; 0.0 without an evaluation."""
        return self._best[0] if self._best else 0.0

    def state_dict(self):
        """Return what a checkpoint must keep: the best Acc@1 and Acc@5, the throughput, the beginning, the position."""
        state = {"best": self._best or None, "began": self._began, "speed": {self._place: self._speed}}
        return dict(state, position=self._position)

    def load_state_dict(self, state):
        """Take the state of the run that is resumed, and go on in its metrics.jsonl."""
        self._best, self._skipped = state["best"] or (), int(self._precision.skipped)
        # Its speed counts where an evaluation is all that is left to do.
        self._began, self._speed = state.get("began", self._began), state.get("speed", {}).get(self._place, {})
        self._position = state.get("position")
        self._record("run", began=self._began, position=self._position, **self._facts)

    def finish(self):
        """Write the result of the run as JSON: its throughput, its best accuracy."""
        result = {"e2e_seconds": round(time.time() - self._started, 3), **self._speed}
        result.update(zip(("acc1", "acc5"), self._best))
        self.line("=> result " + json.dumps(result, sort_keys=True))
        self._record("result", **result)
