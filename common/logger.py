"""The one writer of log lines: to the log file, the standard output and the terminal; as JSON to metrics.jsonl."""

import json
import os
import sys
import time

from common.compiled import library
from common.device import describe_environment
from common.epoch import Epoch
from common.epoch import count_correct as count_correct  # the bundles take it from here
from common.errors import UserError, printable
from common.live import LiveLine, open_terminal
from common.metrics import Metrics

INPUT_BOUND = 0.25  # share of the time spent waiting for data from which the log says so
JUDGED_STEPS = 20  # and after how many steps, since the workers may start slowly


def add_arguments(parser):
    """Declare the options of the log."""
    group = parser.add_argument_group("log")
    group.add_argument("-p", "--print-freq", type=int, default=10, metavar="N", help="steps between two log lines")
    group.add_argument("--log-dir", metavar="DIR", help="folder of the files of the log (default: none)")
    group.add_argument("--log-id", default="0", metavar="ID", help="names train_<id>.log in it")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's files to --log-dir")


class Log:
    """Writes the lines of a run on rank 0, and keeps the sums that the lines show."""

    def __init__(self, device, args, network):
        """Open the files, and find the terminal.

        Args:
            device: the `common.device.Device`.
            args: `print_freq`, `log_dir`, `log_id`, `tensorboard`.
            network: the bundle's name for its network.

        Raises:
            UserError: the folder cannot be written, or `tensorboard` without one.
        """
        if args.tensorboard and not args.log_dir:
            raise UserError("--tensorboard needs --log-dir: its files go there")
        self.device, self.network = device, network
        self.print_freq = max(1, args.print_freq)
        self._started = time.time()
        self._text = self._precision = None
        folder = args.log_dir if device.ranks.is_main else None
        self.live = LiveLine(open_terminal() if device.ranks.is_main else None)
        try:
            if folder:
                os.makedirs(folder, exist_ok=True)
                self._text = open(os.path.join(folder, "train_{}.log".format(args.log_id)), "a", encoding="utf-8")
            self.metrics = Metrics(folder, args.tensorboard, self.line)
        except OSError as error:
            raise UserError("{}: {}".format(folder, error.strerror)) from None
        self.run_steps, self.untimed_steps = 0, None
        self._timed_images = self._timed_seconds = self._timed_steps = self._timed_wait = 0
        self.last_loss = self._best = None
        self._overflows, self._said_input_bound = 0, False
        self.last_checkpoint = None

    def line(self, text, live=False):
        """Write one line, on rank 0; the terminal does not get it where a `live` line tells the same."""
        if not self.device.ranks.is_main:
            return
        # Fields are separated by tabs; nothing else that moves the cursor may come from a name.
        text = "\t".join(printable(part) for part in text.split("\t"))
        self.live.write(text, live)
        if not sys.stdout.isatty():
            print(text, flush=True)
        if self._text is not None:
            try:
                self._text.write(text + "\n")
                self._text.flush()
            except OSError as error:  # a full disk: the training is worth more than its log
                self._text = None
                self.line("[Warning] the log file ends here: {}".format(error.strerror))

    def start(self, args, precision):
        """Write the line that says what runs, and all of it to metrics.jsonl."""
        self._precision = precision
        facts = {
            "network": self.network,
            "arch": args.arch,
            "batch_size": args.batch_size,
            "rank_size": self.device.ranks.world_size,
            "device": self.device.type,
            "device_name": self.device.name,
            "data": "synthetic" if args.synthetic else args.data,
            "epochs": args.epochs,
            "date": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._started)),
            "precision": precision.label,
            "opt_level": args.opt_level if args.amp else "O0",
        }
        facts.update(describe_environment())
        for remark in self.device.remarks + self.live.remarks:
            self.line(remark)
        self.line("=> run " + json.dumps(facts, sort_keys=True))
        self.metrics.record("run", args=vars(args), **facts)

    def train(self, loader, epoch, samples, args):
        """Return the `Epoch` that counts training epoch `epoch` from sample `samples` of its order on."""
        self.metrics.draw()
        return Epoch(self, loader, epoch, samples, args.epochs, args.max_steps)

    def batches(self, loader):
        """Yield the batches of val/ that `loader`, an `input.Loader`, has for this rank, and show how many are done."""
        self.live.start("val/", 0, loader.steps)
        for batch in loader.batches():
            yield batch
            self.live.step()
        self.live.stop(leave=False)

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
        self.name_unreadable(loader)
        unreadable = len(loader.bad)
        assert seen + unreadable == len(loader), "{} of {} validation images were counted".format(seen, len(loader))
        acc1, acc5 = (100.0 * correct / len(loader) for correct in (correct1, correct5))
        self.line(" * Acc@1 {:.3f} Acc@5 {:.3f}".format(acc1, acc5))
        if unreadable:
            self.line("[Warning] {} validation images could not be read; they count as wrong".format(unreadable))
        self.metrics.record("eval", epoch=epoch, acc1=acc1, acc5=acc5, images=seen, unreadable=unreadable)
        if self._best is None or acc1 > self._best[0]:
            self._best = (acc1, acc5)
        return acc1, acc5

    def name_unreadable(self, loader):
        """Write a line for each image that `loader` could not read and that has none yet."""
        while loader.unnamed:
            self.line("[Warning] {} cannot be read: {}".format(*loader.unnamed.pop(0)))

    def state_dict(self):
        """Return what a checkpoint must keep: the best (Acc@1, Acc@5) so far, and where the history is."""
        return {"best": self._best, "metrics": self.metrics.state_dict()}

    def load_state_dict(self, state):
        """Take the best accuracy and the history of the run that is resumed."""
        self._best, self._overflows = state["best"], self._precision.skipped
        self.metrics.load_state_dict(state.get("metrics"))

    def note_skipped_steps(self):
        """Return how many steps of the run were skipped because a gradient overflowed; new ones get a line."""
        skipped = self._precision.skipped if self.device.ranks.is_main and self._precision else 0
        if skipped > self._overflows:
            self.line("skipped {} steps: a gradient overflowed ({} so far)".format(skipped - self._overflows, skipped))
        self._overflows = skipped
        return skipped

    def timed(self, images, seconds, steps, wait):
        """Add a stretch of training to the throughput of the run; say once that it waits for its data too long."""
        self._timed_images += images
        self._timed_seconds += seconds
        self._timed_steps += steps
        self._timed_wait += wait
        share = self._timed_wait / self._timed_seconds
        if share > INPUT_BOUND and self._timed_steps >= JUDGED_STEPS and not self._said_input_bound:
            self._said_input_bound = True
            compiler = "" if library("jpeg") else "install a C compiler (cc) for faster decoding, "
            self.line(
                "[Warning] waiting for data takes {:.0f} % of the time: raise --workers, {}or pack the data set "
                "(python -m common.pack --help)".format(100 * share, compiler)
            )

    def finish(self):
        """Write the last lines: throughput over the run, and the result as JSON."""
        result = {"e2e_seconds": round(time.time() - self._started, 3)}
        if self._timed_seconds:
            result["fps"] = self._timed_images / self._timed_seconds
            result["step_seconds"] = self._timed_seconds / self._timed_steps
            self.line(" * FPS@all {:.3f}, TIME@all {:.3f}".format(result["fps"], result["step_seconds"]))
        if self.last_loss is not None:
            result["loss"] = self.last_loss
        if self._best is not None:
            result["acc1"], result["acc5"] = self._best
        self.line("=> result " + json.dumps(result, sort_keys=True))
        self.metrics.record("result", **result)
        self.metrics.draw(end=True)
