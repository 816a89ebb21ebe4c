"""One training epoch as the log sees it: its steps, and the numbers of a log line at every `--print-freq`-th of them.

FPS is the number of images of all cards divided by the wall time between two synchronised log points. Waiting for data
counts; the first `SKIPPED_STEPS` steps, evaluations and checkpoints do not.
"""

import collections
import contextlib
import math
import time

import torch

from common.errors import UserError
from common.live import short_time

SKIPPED_STEPS = 5  # of a run, or its first half: memory pools, kernels and workers are still being set up


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
        self._epochs = epochs
        self.number, self.samples, self.progress = number, samples, number + samples / len(loader)
        self._step = -(-samples // self._global_batch)  # fewer or more ranks may have done the first part
        self._steps = self._step + loader.steps_from(samples)
        left = max_steps - number * loader.steps if max_steps else self._steps
        self._last_step = min(self._steps, left)
        self._later_steps = (epochs - number - 1) * loader.steps
        if max_steps:
            self._later_steps = min(self._later_steps, left - self._last_step)
        if log.untimed_steps is None:
            log.untimed_steps = min(SKIPPED_STEPS, self._remaining() // 2)
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
        self._log.live.start("Epoch {}/{}".format(self.number, self._epochs), self._step, self._last_step)
        for images, targets in self._loader.batches(self.number, self.samples):
            self._log.name_unreadable(self._loader)
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
        log.run_steps += 1
        log.live.step()
        if log.run_steps == log.untimed_steps or self._step % log.print_freq == 0 or self._step == self._last_step:
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
        if log.run_steps <= log.untimed_steps:
            if device.compiles:
                log.line("=> {} steps and their compilation took {:.1f} s, left out of FPS".format(steps, seconds))
        else:
            log.timed(images, seconds, steps, wait)
            sums.update(timed_images=images, timed_seconds=seconds)
        log.last_loss = losses[-1]
        self._check_finite(losses)
        fps, acc1, acc5 = images / seconds, 100 * correct1 / images, 100 * correct5 / images
        mean_acc1, mean_acc5 = 100 * sums["correct1"] / sums["images"], 100 * sums["correct5"] / sums["images"]
        mean_fps = sums["timed_images"] / max(sums["timed_seconds"], 1e-9) or fps
        step_seconds, mean_loss = sums["seconds"] / sums["steps"], sums["loss"] / sums["steps"]
        run_seconds = self._remaining() * step_seconds
        fields = [
            "Epoch: [{}][{:4d}/{}]".format(self.number, self._step, self._steps),
            "Time {:6.3f} ({:6.3f})".format(seconds / steps, step_seconds),
            "Data {:6.3f} ({:6.3f})".format(wait / steps, sums["wait"] / sums["steps"]),
            "Loss {:.4e} ({:.4e})".format(losses[-1], mean_loss),
            "Acc@1 {:6.2f} ({:6.2f})".format(acc1, mean_acc1),
            "Acc@5 {:6.2f} ({:6.2f})".format(acc5, mean_acc5),
            "LR {:.5g}".format(learning_rate),
            "FPS {:.2f} ({:.2f})".format(fps, mean_fps),
            "ETA {}".format(_clock(run_seconds)),
        ]
        log.line("\t".join(fields), live=True)
        skipped = log.note_skipped_steps()
        memory = device.memory_gib()
        log.metrics.record(
            "train", epoch=self.number, step=self._step, steps=self._steps, loss=sum(losses) / steps, losses=losses,
            acc1=acc1, acc5=acc5, fps=fps, lr=learning_rate, data_seconds=wait / steps, step_seconds=seconds / steps,
            memory_gib=memory, skipped=skipped,
        )  # fmt: skip
        log.live.show(
            epoch=self.number, epochs=self._epochs, loss=mean_loss, acc1=mean_acc1, fps=fps, lr=learning_rate,
            wait=wait / seconds, memory=memory, left=short_time((self._last_step - self._step) * step_seconds),
            run_left=short_time(run_seconds), skipped=" skipped {}".format(skipped) if skipped else "",
        )  # fmt: skip
        if self._step == self._last_step:
            log.live.stop()
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
