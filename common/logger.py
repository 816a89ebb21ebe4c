"""The log of a run: its lines, FPS, the live line of a terminal, and metrics.jsonl.

FPS is the number of images of all cards divided by the wall time between two synchronised log points. Waiting for data
counts; the first `UNTIMED_STEPS` steps of a run, evaluations and checkpoints do not.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

from common import arguments, checkpoint
from common.device import describe_environment
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


def count_correct(logits, targets):
    """Return int64 [3]: targets among the best 1 and 5 of `logits` [B, C], and how many targets there are.

    Negative targets (padding, unreadable images) are no target; with fewer than 5 classes all are best; NaN is wrong.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1)[1]
    hits = (best == targets.unsqueeze(1)) & ~torch.isnan(logits).any(dim=1, keepdim=True)
    return torch.stack([hits[:, 0].sum(), hits.sum(), (targets >= 0).sum()])


def _open_terminal():
    """Return the terminal that the user looks at as a text file, or None where there is none."""
    if sys.stdout.isatty():
        return sys.stdout
    with contextlib.suppress(KeyError, OSError):  # launch.sh sends the standard output to nohup.out
        # Without O_NOCTTY it could become the terminal whose Ctrl-C ends this process.
        return open(os.open(os.environ["LIVE_TERMINAL"], os.O_WRONLY | os.O_NOCTTY), "w", buffering=1)


def _averages(sums):
    """Return what a log line shows of sums over steps: Acc@1 and Acc@5 in percent, seconds of a step, ..."""
    return {
        "loss": sums["loss"] / sums["images"],
        "acc1": 100 * sums["correct1"] / sums["images"],
        "acc5": 100 * sums["correct5"] / sums["images"],
        "fps": sums["images"] / sums["seconds"],
        "step_seconds": sums["seconds"] / sums["steps"],
        "data_seconds": sums["wait"] / sums["steps"],
    }


class Log:
    """Writes the log of a run, on rank 0, and counts its steps.

    Attributes:
        is_complete, is_final: whether no step of the epoch is left; whether the run ends with it.
        best_acc1: the best Acc@1 of the run so far in percent; 0.0 without an evaluation.
        last_checkpoint: path of the last checkpoint that was written or resumed, or None.
    """

    def __init__(self, card, args, network):
        """Open the files of `--log-dir`, or raise UserError; `network` is the bundle's name for its network."""
        self._card, self._ranks, self._args, self._network = card, card.ranks, args, network
        self._started = float(os.environ.get("SCRIPT_STARTED") or time.time())
        self._terminal = _open_terminal() if card.ranks.is_rank0 else None
        self._timed, self._run_steps, self._untimed_steps, self._skipped, self._save = Counter(), 0, None, 0, None
        self._files, self._text, self._first_record = {}, "train_{}.log".format(args.log_id), None
        self.best_acc1, self._best_acc5, self.last_checkpoint = 0.0, None, None
        if args.log_dir and card.ranks.is_rank0:
            try:
                os.makedirs(args.log_dir, exist_ok=True)
                self._open(self._text)
                if args.evaluate or not args.resume:  # else `load_state_dict` finds out whether it goes on
                    checkpoint.keep_previous(os.path.join(args.log_dir, METRICS))
                    self._open(METRICS)
            except OSError as error:
                raise UserError("--log-dir {}: {}".format(args.log_dir, error.strerror)) from None

    def _open(self, name):
        self._files[name] = open(os.path.join(self._args.log_dir, name), "a", encoding="utf-8")

    def _write(self, name, text):
        try:
            if name in self._files:
                print(text, file=self._files[name], flush=True)
        except OSError as error:  # a full disk: the training is worth more than its log
            del self._files[name]
            self.line("[Warning] {} ends here: {}".format(name, error.strerror))

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
            print(text, flush=True)
        self._write(self._text, text)

    def _record(self, kind, **values):
        """Append an object of `kind` "run", "train", "eval" or "result" to metrics.jsonl."""
        text = json.dumps(dict(kind=kind, time=round(time.time() - self._started, 3), **values))
        self._first_record = self._first_record or text
        self._write(METRICS, text)

    def start(self, args, precision):
        """Write what was chosen for the user, and what runs; `precision` is the `common.precision.Precision`."""
        self._precision = precision
        for notice in [*args.notices, *self._card.notices]:
            self.line(notice)
        facts = {name: getattr(args, name) for name in ("arch", "batch_size", "epochs", "opt_level")}
        facts.update(describe_environment(), network=self._network, rank_size=self._ranks.world_size)
        facts.update(device=self._card.type, device_name=self._card.name, precision=precision.label)
        facts["data"] = "synthetic" if args.synthetic else args.data
        facts["date"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._started))
        self.line("=> run " + json.dumps(facts, sort_keys=True))
        self._facts = dict(facts, args=arguments.as_dict(args))
        self._record("run", **self._facts)

    def when_stopped(self, save):
        """Have `save(signum)` called where a signal ends the wait for a batch, or an evaluation."""
        self._save = save

    def _stop(self):
        if self._save is not None:
            self._save(self._ranks.stop_signal)
        raise Stopped(self._ranks.stop_signal)

    def _show(self, batches, title, total, done=0, leave=False):
        """Yield `batches`; a live line of the terminal, if there is one, shows how many of `total` are done."""
        tqdm.monitor_interval = 0  # no thread beside the forks of the data loader
        options = {"initial": done, "file": self._terminal, "disable": self._terminal is None, "dynamic_ncols": True}
        form = title + " {n}/{total} |{bar}|{postfix}"
        self._bar = tqdm(batches, total=total, leave=leave, bar_format=form, **options)
        try:
            yield from self._bar
        except Stopped:  # while it waited for one
            self._stop()

    def steps(self, loader, number, samples):
        """Yield the batches that are left of training epoch `number` after `samples` samples; `step` follows each."""
        args, self._loader, self._number = self._args, loader, number
        # Another number of ranks may have done the first part: how many steps of this size that is, rounded up.
        self._step = -(-samples // (args.batch_size * self._ranks.world_size))
        self._steps = self._step + loader.steps_from(samples)
        run_steps, done_before = args.max_steps or math.inf, number * loader.steps
        self._last_step = min(self._steps, run_steps - done_before)
        later_steps = max(0, min(args.epochs * loader.steps, run_steps) - done_before - loader.steps)
        self._steps_left = max(0, self._last_step - self._step) + later_steps
        self.is_complete, self.is_final = self._step >= self._steps, later_steps == 0
        if self._untimed_steps is None:
            self._untimed_steps = min(UNTIMED_STEPS, self._steps_left // 2)
        self._epoch, self._since_log, self._losses = Counter(), Counter(), []  # the sums of a log line
        self._since_sync, self._sync_every, self._stop_signal = [], 1, 0
        self._card.synchronize()
        self._synced, self._waited = time.perf_counter(), loader.wait_seconds
        batches = itertools.islice(loader.batches(number, samples), max(0, self._last_step - self._step))
        title = "{}/{}".format(number, args.epochs)
        for batch in self._show(batches, title, self._last_step, self._step, leave=True):
            if self._ranks.world_size == 1 and loader.new_bad:
                self._share_bad(loader)
            yield batch

    def _share_bad(self, loader):
        loader.share_bad()
        for path, reason in loader.unnamed:
            self.line("[Warning] {} cannot be read: {}".format(path, reason))
        del loader.unnamed[:]

    def step(self, loss, logits, batch, learning_rate):
        """Count a step with `loss` (scalar, the mean of this rank) and `logits` [B, C]; return 0 or a signal to stop.

        The signal is the same on all ranks. Nothing waits for the device except at log points and, with several ranks,
        every `SYNC_SECONDS`; there UserError is raised where a loss was not finite or too many images are bad.
        """
        loss = loss.detach().float().reshape(1) * batch.weight
        self._since_sync.append(torch.cat([loss, count_correct(logits.detach(), batch.targets).float()]))
        self._step, self._run_steps, self._steps_left = self._step + 1, self._run_steps + 1, self._steps_left - 1
        self.is_complete, has_ranks = self._step >= self._steps, self._ranks.world_size > 1
        is_log_point = self._step % self._args.print_freq == 0 or self._step == self._last_step
        is_log_point = is_log_point or self._run_steps == self._untimed_steps
        if is_log_point or (has_ranks and len(self._since_sync) >= self._sync_every):
            self._sync()
        if is_log_point:
            self._report(learning_rate)
        return self._stop_signal if has_ranks else self._ranks.stop_signal

    def _sync(self):
        """Add up what all ranks have done since the last time; their signals and bad images travel with it."""
        self._card.synchronize()
        now, loader, world, steps = time.perf_counter(), self._loader, self._ranks.world_size, len(self._since_sync)
        own = [now - self._synced, loader.new_bad, *(self._ranks.stop_signal == signum for signum in STOP_SIGNALS)]
        own = torch.tensor([float(value) for value in own], device=self._card.torch_device)
        seconds, new_bad, *values = self._ranks.sum(torch.cat([own, *self._since_sync])).tolist()
        signals, values = values[: len(STOP_SIGNALS)], values[len(STOP_SIGNALS) :]
        losses, correct1, correct5, images = (
            [loss / world for loss in values[::4]],
            values[1::4],
            values[2::4],
            values[3::4],
        )
        self._since_log.update(steps=steps, seconds=seconds / world, wait=loader.wait_seconds - self._waited)
        self._since_log.update(correct1=sum(correct1), correct5=sum(correct5), images=sum(images))
        self._since_log.update(loss=sum(loss * count for loss, count in zip(losses, images)))
        self._losses, self._since_sync, self._last_loss = self._losses + losses, [], losses[-1]
        self._synced, self._waited = now, loader.wait_seconds
        self._sync_every = max(1, int(SYNC_SECONDS * steps * world / seconds))
        self._stop_signal = next((signum for signum, count in zip(STOP_SIGNALS, signals) if count), 0)
        if new_bad:
            self._share_bad(loader)
        if not all(map(math.isfinite, losses)):
            saved = self.last_checkpoint
            saved = "The last checkpoint is {}.".format(saved) if saved else "No checkpoint was written yet."
            text = "the loss is not a finite number between steps {} and {} of epoch {}. {} Try a lower learning rate, "
            text += "a longer warm-up, or --opt-level O0."
            raise UserError(text.format(self._step - steps + 1, self._step, self._number, saved))

    def _report(self, learning_rate):
        """Write the steps since the last log point: to the log, to metrics.jsonl, on the live line."""
        sums, losses = self._since_log, self._losses
        self._since_log, self._losses = Counter(), []
        self._epoch.update(sums)
        if self._run_steps > self._untimed_steps:
            self._timed.update(sums)
        now, mean = _averages(sums), _averages(self._epoch)
        mean["fps"] = _averages(self._timed or sums)["fps"]
        seconds = int(self._steps_left * mean["step_seconds"])
        left = "{}:{:02d}:{:02d}".format(seconds // 3600, seconds // 60 % 60, seconds % 60)
        place = {"epoch": self._number, "step": self._step, "steps": self._steps, "lr": learning_rate}
        self.line(PROGRESS.format(now=now, mean=mean, loss=losses[-1], left=left, **place), is_progress=True)
        self._bar.set_postfix_str(LIVE.format(now=now, mean=mean, left=left, lr=learning_rate))
        before, self._skipped = self._skipped, self._precision.skipped if self._ranks.is_rank0 else 0
        if self._skipped > before:
            counts = self._skipped - before, self._skipped
            self.line("skipped {} steps: a gradient overflowed ({} so far)".format(*counts))
        memory = self._card.memory_gib()
        self._record("train", losses=losses, memory_gib=memory, skipped=self._skipped, **place, **now)

    @contextlib.contextmanager
    def paused(self):
        """Leave out of the throughput what happens inside (a checkpoint, say)."""
        self._card.synchronize()
        began = time.perf_counter()
        yield
        self._synced += time.perf_counter() - began

    def batches(self, loader):
        """Yield the batches of val/ that `loader` has for this rank; raise Stopped when a signal has reached it."""
        for batch in self._show(loader.batches(), "val/", loader.steps):
            yield batch
            if self._ranks.stop_signal:
                self._stop()

    def evaluation(self, epoch, loader, counts):
        """Write the accuracy after `epoch`; return (Acc@1, Acc@5) in percent of all images, unreadable ones wrong.

        `counts` is the int64 [3] of `count_correct`, summed over all batches of `loader` and all ranks.
        """
        correct1, correct5, seen = counts.tolist()
        self._share_bad(loader)
        unreadable = len(loader.bad)
        assert seen + unreadable == len(loader), "{} of {} validation images were counted".format(seen, len(loader))
        acc1, acc5 = 100 * correct1 / len(loader), 100 * correct5 / len(loader)
        self.line(" * Acc@1 {:.3f} Acc@5 {:.3f}".format(acc1, acc5))
        if unreadable:
            self.line("[Warning] {} validation images could not be read; they count as wrong".format(unreadable))
        self._record("eval", epoch=epoch, acc1=acc1, acc5=acc5, images=seen, unreadable=unreadable)
        if self._best_acc5 is None or acc1 > self.best_acc1:
            self.best_acc1, self._best_acc5 = acc1, acc5
        return acc1, acc5

    def state_dict(self):
        """Return what a checkpoint must keep: the best (Acc@1, Acc@5) so far, and how metrics.jsonl begins."""
        best = None if self._best_acc5 is None else (self.best_acc1, self._best_acc5)
        return {"best": best, "first_record": self._first_record}

    def load_state_dict(self, state):
        """Take the best accuracy of the run that is resumed, and go on in its metrics.jsonl if `--log-dir` has it."""
        self.best_acc1, self._best_acc5 = state["best"] or (0.0, None)
        self._skipped, self._first_record = self._precision.skipped, state.get("first_record")
        if self._files:
            path, found = os.path.join(self._args.log_dir, METRICS), None
            with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
                found = file.readline().strip()
            if found != self._first_record:
                checkpoint.keep_previous(path)
                self.line("{} has no {} of the run before: it begins here".format(self._args.log_dir, METRICS))
                self._first_record = None
            self._open(METRICS)
            self._record("run", **self._facts)

    def finish(self):
        """Write the last lines: throughput over the run, and the result as JSON."""
        result = {"e2e_seconds": round(time.time() - self._started, 3)}
        if self._timed:
            means = _averages(self._timed)
            result.update(fps=means["fps"], step_seconds=means["step_seconds"], loss=self._last_loss)
            self.line(" * FPS@all {fps:.3f}, TIME@all {step_seconds:.3f}".format(**means))
        if self._best_acc5 is not None:
            result.update(acc1=self.best_acc1, acc5=self._best_acc5)
        self.line("=> result " + json.dumps(result, sort_keys=True))
        self._record("result", **result)
