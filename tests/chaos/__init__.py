"""Runs that are killed, and what they leave: the helpers of the tests of reliability. LONG=1 asks for the long form."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
import uuid

import numpy as np
import torch
from PIL import Image

from common import checkpoint
from tests.bundles import ROOT

LONG = os.environ.get("LONG") == "1"
FLAGS = {
    "MnasNet": ["--arch", "mnasnet0_5", "--warmup-epochs", "1", "--image-size", "32"],
    "ShuffleNetV2": ["--arch", "shufflenet_v2_x0_5", "--warmup-epochs", "1", "--image-size", "32"],
    "SPACH-SMLP": ["--arch", "spach_xxs_patch16_224_attn", "--warmup-epochs", "1", "--image-size", "32"],
}


def make_images(folder, train=40, val=10, classes=2):
    """Write an ImageFolder of noise, `train` and `val` images in all; return its path as text."""
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            place = pathlib.Path(str(folder)) / split / "class{}".format(index % classes)
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.RandomState([index, len(split)]).randint(0, 256, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((60, 48)).save(str(place / "{:04d}.jpg".format(index)), quality=90)
    return str(folder)


def flags(bundle, data, out, *more):
    """Return the flags of a run of a few seconds that shuffles, crops, and decodes in two processes."""
    fixed = ["--device", "cpu", "--data", data, "--output-dir", out, "-j", "2", "-b", "4", "--cpu-batch-size", "4"]
    fixed += ["--epochs", "2", "-p", "1", "--lr", "0.02", "--on-save-error", "stop"]
    return [str(word) for word in [*FLAGS[bundle], *fixed, *more]]


def command(bundle, data, out, *more):
    """Return the command line of such a run."""
    return [sys.executable, "-u", str(ROOT / bundle / "main.py"), *flags(bundle, data, out, *more)]


def weights(out, name="checkpoint.pth.tar"):
    """Return everything of a checkpoint that later steps depend on, as one flat dict."""
    content = checkpoint.read(os.path.join(str(out), name))
    flat = dict(content["state_dict"])
    flat.update(("ema." + key, value) for key, value in content.get("state_dict_ema", {}).items())
    for number, state in content["optimizer"]["state"].items():
        flat.update(("{} {}".format(number, key), value) for key, value in state.items())
    flat["position"] = torch.tensor([content["epoch"], content["samples"]])
    flat["best"] = torch.tensor(content["best_acc1"])
    return {key: value for key, value in flat.items() if torch.is_tensor(value)}


def assert_equal(one, other):
    """Compare two results of `weights`, bit by bit."""
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, "{} of {} differ: {}".format(len(different), len(one), different[:3])


def position(out, name="checkpoint.pth.tar"):
    """Return (epoch, samples done) of a checkpoint."""
    content = checkpoint.read(os.path.join(str(out), name))
    return content["epoch"], content["samples"]


def wait_for(condition, seconds=120, process=None):
    """Wait until `condition()` is true and return what it gave; fail after `seconds` or when `process` has ended."""
    deadline = time.time() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.time() < deadline, "waited in vain for {} seconds".format(seconds)
        assert process is None or process.poll() is None, "the run has ended before"
        time.sleep(0.01)


class Job:
    """A run in processes of its own, whose every descendant can be found."""

    def __init__(self, words, log, **environment):
        self.log, self._mark = pathlib.Path(str(log)), "CHAOS_MARK={}".format(uuid.uuid4().hex)
        self._shared_memory = set(os.listdir("/dev/shm"))
        key, value = self._mark.split("=")
        variables = dict(os.environ, PYTHON=sys.executable, OMP_NUM_THREADS="1", **{key: value})
        variables.update(environment)
        with open(str(self.log), "wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words], env=variables, stdout=file, stderr=file, start_new_session=True
            )

    def text(self):
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern, seconds=120):
        """Wait until it has printed `pattern` and return the match."""
        return wait_for(lambda: re.search(pattern, self.text()), seconds, self.process)

    def alive(self):
        """Return {pid: command line} of the processes that it has started, their children too."""
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                try:
                    environment = pathlib.Path("/proc", entry, "environ").read_bytes()
                    if self._mark.encode() in environment.split(b"\0"):
                        words = pathlib.Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
                        found[int(entry)] = " ".join(word.decode(errors="replace") for word in words)
                except OSError:
                    continue
        return found

    def ranks(self, count):
        """Wait for the processes with RANK=0 ... count - 1 that are no decoding processes, and return their pids."""

        def find():
            pids = {}
            for pid in sorted(self.alive(), reverse=True):  # a rank is older than its decoding processes
                try:
                    words = pathlib.Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                pids.update((int(word[5:]), pid) for word in words if word.startswith(b"RANK="))
            return [pids[rank] for rank in range(count)] if len(pids) == count else None

        return wait_for(find, 120, self.process)

    def end(self, seconds):
        """Wait for the end, at most `seconds`; check that nothing is left, and return the exit status."""
        started = time.time()
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("no end within {} seconds\n{}".format(seconds, self.text())) from None
        try:
            wait_for(lambda: not self.alive(), 10)
            wait_for(lambda: not set(os.listdir("/dev/shm")) - self._shared_memory, 10)
        except AssertionError:
            left, shared = self.alive(), set(os.listdir("/dev/shm")) - self._shared_memory
            self.kill()
            raise AssertionError("left behind: {} {}".format(left, shared)) from None
        assert "traceback" not in self.text().lower(), self.text()
        self.seconds = time.time() - started
        return status

    def kill(self):
        """Kill whatever is left."""
        for pid in self.alive():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue


class Server:
    """Starts runs of one bundle in a fraction of a second: a process that has imported everything forks them."""

    def __init__(self, bundle):
        self.bundle = bundle
        self._server = subprocess.Popen(
            [sys.executable, "-u", str(pathlib.Path(__file__).with_name("server.py")), str(ROOT / bundle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            universal_newlines=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )

    def start(self, words, log, file_size=None):
        """Start a run with the flags `words`; `file_size` limits what it may write to one file. Return its pid."""
        pathlib.Path(str(log)).write_text("")
        request = {"flags": [str(word) for word in words], "log": str(log), "file_size": file_size}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    @staticmethod
    def wait_for(log, pattern):
        """Wait until the run has printed `pattern`."""
        wait_for(lambda: re.search(pattern, pathlib.Path(str(log)).read_text(errors="replace")))

    def end(self):
        """Wait for the end of the run and return its exit status, negative after a signal."""
        return int(self._server.stdout.readline())

    def run(self, words, log, **options):
        """Start a run, wait for its end, and return (exit status, what it printed)."""
        self.start(words, log, **options)
        status = self.end()
        return status, pathlib.Path(str(log)).read_text(errors="replace")

    def close(self):
        """End the server."""
        self._server.stdin.close()
        self._server.wait(30)
