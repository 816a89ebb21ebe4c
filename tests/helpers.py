"""What the tests share: bundles, runs of them, small networks, images, a device without a card, runs that are killed.

It needs no pytest, so that programs that tests start in other environments (old torch, torch_npu) can import it too.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
import zlib
from unittest import mock

import common  # noqa: F401  isort: skip  before torch
import numpy as np
import torch
from PIL import Image

from common import checkpoint
from common.data import Batch, ImageFolder, Loader
from common.distributed import Ranks
from common.logger import Log
from common.transforms import CenterCrop, RandomResizedCrop

# ---- bundles

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLES = sorted(path.parent.name for path in ROOT.glob("*/main.py"))


def _purge():
    for name in list(sys.modules):
        if name.split(".")[0] in ("models", "main"):
            del sys.modules[name]


@contextlib.contextmanager
def imported(bundle, module="models"):
    """Yield `module` of the folder `bundle`; nothing of the bundle stays importable afterwards."""
    folder = str(ROOT / bundle)
    _purge()
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module(module)
    finally:
        sys.path.remove(folder)
        _purge()


def copy_bundle(bundle, place):
    """Copy one bundle and common/ into the folder `place`; return the bundle's folder there."""
    ignored = shutil.ignore_patterns("output", "*.pth.tar*", "__pycache__")
    for name in ("common", bundle):
        if not (place / name).exists():
            shutil.copytree(str(ROOT / name), str(place / name), ignore=ignored)
    return place / bundle


def run(command, cwd=None, timeout=900, **environment):
    """Run `command`; return the finished process with its text in `stdout` and `stderr`."""
    variables = dict(os.environ, **dict({"PYTHON": os.environ.get("PYTHON", sys.executable)}, **environment))
    return subprocess.run(
        [str(word) for word in command],
        cwd=str(cwd or pathlib.Path.home()),
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=timeout,
    )


def main_py(bundle, *flags, **kwargs):
    """Run a bundle's main.py on the CPU; return the finished process."""
    python = os.environ.get("PYTHON", sys.executable)
    return run([python, ROOT / bundle / "main.py", "--device=cpu", *flags], **kwargs)


def run_script(bundle, name, *options, **kwargs):
    """Run test/train_<name>.sh of the bundle's folder `bundle`."""
    return run(["bash", bundle / "test" / "train_{}.sh".format(name), *options], **kwargs)


# ---- small networks

SMALL = {  # two images on a last map of 1x1 would leave BatchNorm two numbers, and gradients beyond all bounds
    "MnasNet": ["--arch", "mnasnet0_5", "--image-size", "64"],
    "SPNASNet_100": ["--image-size", "64"],
    "SPACH-SMLP": ["--arch", "spach_xxs_patch16_224_attn", "--image-size", "32"],
    "PnasNet5Large": ["--image-size", "64", "--aux-weight", "0"],
    "ShuffleNetV2": ["--arch", "shufflenet_v2_x0_5", "--image-size", "32"],
}


def small(bundle):
    """Return flags that make a bundle's network and images small enough for a test; any new bundle needs some."""
    return SMALL[bundle]


# ---- tiers: pyproject.toml says what they are


def tiers(default, slow):
    """Return cases of `parametrize`: those of the default tier, and those of `slow` that are not among them."""
    import pytest

    longer = [case if isinstance(case, tuple) else (case,) for case in slow if case not in default]
    return [*default, *(pytest.param(*case, marks=pytest.mark.slow) for case in longer)]


# ---- what a run prints and leaves

FIELDS = [r"Epoch: \[\d+\]\[ *\d+/\d+\]", r"Time ( *[\d.]+) \( *[\d.]+\)", r"Data  *[\d.]+ \( *[\d.]+\)"]
FIELDS += [r"Loss (\S+e\S+) \((\S+e\S+)\)", r"Acc@1  *[\d.]+ \( *[\d.]+\)", r"Acc@5  *[\d.]+ \( *[\d.]+\)"]
FIELDS += [r"LR \S+", r"ETA \d+:\d\d:\d\d", r"FPS ([\d.]+) \(([\d.]+)\)"]
LINE = re.compile("\t".join(FIELDS))


def assert_refused(process, status, *words):
    """Assert one clear line with `words`, the exit status, and nothing that looks like a result or a crash."""
    text = process.stdout + (process.stderr or "")
    assert process.returncode == status, text
    errors = [line for line in text.splitlines() if line.startswith("[Error]")]
    assert len(errors) == 1, text
    for word in words:
        assert word in errors[0]
    assert "Final" not in text
    assert "traceback" not in text.lower()  # "(traceback in FILE)" too: an error that nobody has foreseen


def result_file(bundle, kind, device_id=0):
    """Return the keys and values of the run's only ..._<kind>.log."""
    (path,) = (bundle / "test" / "output" / str(device_id)).glob("*_{}.log".format(kind))
    return dict(line.split(" = ", 1) for line in path.read_text().splitlines())


def loss_file(bundle, device_id=0):
    """Return the losses of the run's loss file."""
    (path,) = (bundle / "test" / "output" / str(device_id)).glob("train_*_loss.txt")
    return [float(line) for line in path.read_text().split()]


# ---- images, and loaders of them without a run around


def photograph(width, height, seed=0):
    """Return a PIL image with structure at every scale, as photographs have."""
    generator = np.random.RandomState(seed)
    layers = np.zeros((height, width, 3))
    for size in (4, 16, 64, 256):
        noise = Image.fromarray(generator.randint(0, 256, (size, size, 3)).astype(np.uint8))
        layers += np.asarray(noise.resize((width, height), Image.BICUBIC), dtype=float)
    return Image.fromarray((layers / 4).astype(np.uint8))


def pattern(mode="RGB", size=(96, 72)):
    """Return a PIL image of smooth waves."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 2 + y, 255 - x, 128 + 60 * np.sin(x / 9.0) * np.cos(y / 7.0)], 2)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image, kind="JPEG", **options):
    """Return the bytes of `image` as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pil_pixels(data):
    """Return numpy [H, W, 3] as PIL decodes `data`."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@functools.lru_cache(maxsize=None)
def odd_images():
    """Return {name: bytes} of files that are unusual and fine, or broken."""
    rgb, grey = pattern(), pattern("L")
    jpeg = encoded(rgb, quality=90)
    palette = rgb.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    frames = [rgb, rgb.rotate(90), grey.convert("RGB")]
    header = jpeg.index(b"\xff\xc0")
    bomb = jpeg[: header + 5] + (20000).to_bytes(2, "big") * 2 + jpeg[header + 9 :]
    sixteen = Image.fromarray((np.arange(96 * 72).reshape(72, 96) * 9).astype(np.uint16))
    return {
        "plain.jpg": jpeg,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated_with_end.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "zero.jpg": b"",
        "text.jpg": b"this is a web page",
        "zeros.jpg": bytes(5000),
        "png_called.jpg": encoded(rgb, "PNG"),
        "jpeg_called.png": jpeg,
        "cmyk.jpg": encoded(pattern("CMYK")),
        "grey.jpg": encoded(grey),
        "rgb.jpg": encoded(rgb, keep_rgb=True),
        "progressive.jpg": encoded(rgb, progressive=True),
        "trailing.jpg": jpeg + b"\0" * 100,
        "rotated.jpg": encoded(rgb, exif=exif),
        "444.jpg": encoded(rgb, subsampling=0),
        "restart.jpg": encoded(rgb, restart_marker_blocks=2),
        "sixteen_bit.png": encoded(sixteen, "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "palette_bytes.png": encoded(palette, "PNG", transparency=bytes(range(16))),
        "alpha.png": encoded(rgb.convert("RGBA"), "PNG"),
        "one_bit.png": encoded(pattern("1"), "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "pages.tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "float.tiff": encoded(pattern("F"), "TIFF"),
        "one_pixel.jpg": encoded(pattern(size=(1, 1))),
        "one_column.png": encoded(pattern(size=(1, 300)), "PNG"),
        "one_row.jpg": encoded(pattern(size=(300, 1))),
        "bomb.jpg": bomb,
        "bomb.png": encoded(Image.new("1", (20000, 20000)), "PNG"),
    }


def mutated(draw, data):
    """Return `data` with flipped bytes, a cut, a repeated piece, or a changed header."""
    data = bytearray(data)
    kind = draw.randrange(5)
    if kind == 0:
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[draw.randrange(len(data)) :]
    elif kind == 2:
        start = draw.randrange(len(data))
        del data[start : start + draw.randrange(1, 50)]
    elif kind == 3:
        start = draw.randrange(len(data))
        data[start:start] = data[start : start + draw.randrange(1, 200)]
    else:
        data[draw.randrange(2, min(700, len(data)))] = draw.randrange(256)
    return bytes(data)


def write_set(folder, files, splits=("train", "val")):
    """Write {"class/name": bytes, or "name": bytes of the one class} to each split of `folder`; return it as text."""
    for split in splits:
        for name, data in files.items():
            path = folder / split / (name if "/" in name else "class/" + name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return str(folder)


class LonelyRanks(Ranks):
    """Rank `rank` of `world_size` ranks of which the others are not there."""

    def __init__(self, rank=0, world_size=1):
        super().__init__()
        self.rank, self.world_size, self.local_world_size = rank, world_size, world_size

    def all_gather(self, value):
        """Return this rank's value alone."""
        return [value]


def card(rank=0, world_size=1):
    """Stand in for the CPU's `Device` of rank `rank`."""
    members = {"type": "cpu", "torch_device": torch.device("cpu"), "channels_last": True, "upload": upload}
    return types.SimpleNamespace(ranks=LonelyRanks(rank, world_size), **members)


def upload(*tensors):
    """Stand in for `Device.upload` of a CPU."""
    copies = [tensor.clone() for tensor in tensors]
    return lambda: copies


def loader(folder, training, rank=0, world_size=1, transform=None, images=None, **options):
    """Return a `Loader` of `folder`, or of `images`, as rank `rank` sees it; `options` replace those of the run."""
    values = {"batch_size": 7, "workers": 0, "seed": 5, "max_bad_images": 0.0, "notices": [], "accumulate": 1}
    args = types.SimpleNamespace(**dict(values, **options))
    images = images or ImageFolder(str(folder), "train" if training else "val")
    transform = transform or (RandomResizedCrop(32) if training else CenterCrop(32, 36))
    return Loader(card(rank, world_size), images, transform, args, (0.5,) * 3, (0.25,) * 3, training)


def seen(loader, epoch=0, start=0):
    """Return (images, targets) of a whole epoch."""
    batches = list(loader.batches(epoch, start))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches])


# ---- weights and images that are the same everywhere: integer arithmetic on name, shape and index

_LOW32 = 0xFFFFFFFF


def _uniform(name, shape):
    """Return float64 values in [-1, 1), the hash (murmur's finaliser) of `name`, `shape` and the index."""
    count = 1
    for extent in shape:
        count *= extent
    bits = torch.arange(1, count + 1, dtype=torch.int64)
    bits.mul_(2654435761).add_(zlib.crc32("{} {}".format(name, tuple(shape)).encode())).bitwise_and_(_LOW32)
    for shift, factor in ((16, 2246822507), (13, 3266489909)):
        bits.bitwise_xor_(bits >> shift).mul_(factor).bitwise_and_(_LOW32)
    bits.bitwise_xor_(bits >> 16)
    return bits.to(torch.float64).div_(2.0**31).sub_(1).reshape(shape)


def fill_(module):
    """Fill all parameters and floating buffers of `module` in place and return it; call `module.double()` before.

    Matrices and kernels get a scale by fan-in that keeps activations O(1), norm weights, layer scales and running_var
    lie in 0.7..1.3, biases and running_mean in -0.1..0.1; integer buffers (num_batches_tracked) stay as they are.
    """
    with torch.no_grad():
        for name, tensor in list(module.named_parameters()) + list(module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            values = _uniform(name, tensor.shape)
            if max(tensor.shape, default=1) < tensor.numel():
                # Variance 4/3 / fan_in: 1 would let the signal die after ReLUs, 2 would let it explode without.
                values *= (4.0 * tensor.shape[0] / tensor.numel()) ** 0.5
            elif name.rpartition(".")[2] in ("bias", "running_mean"):
                values *= 0.1
            else:
                values = 1 + 0.3 * values
            tensor.copy_(values)
    return module


def images(n, size):
    """Return a float64 tensor (n, 3, size, size) of mean 0 and variance 1; image i does not depend on n."""
    return torch.stack([_uniform("image {}".format(i), (3, size, size)) for i in range(n)]) * 3.0**0.5


# ---- logs without a run around


class FakeRanks:
    """One rank of several that are threads; `sums` counts the reductions."""

    def __init__(self, rank=0, world=1, shared=None):
        self.rank, self.world_size, self.is_rank0, self.stop_signal = rank, world, rank == 0, 0
        self.sums, self._shared = 0, shared

    def sum(self, tensor):
        self.sums += 1
        if self.world_size == 1:
            return tensor
        barrier, tensors = self._shared
        tensors[self.rank] = tensor.clone()
        barrier.wait(LIMIT)
        total = sum(tensors)
        barrier.wait(LIMIT)
        return total


class FakeLoader:
    """Batches of equal size, and what the log asks of a loader."""

    def __init__(self, steps=10, batch_size=4, world=1, last=None):
        self.steps, self._batch_size, self._world, self._last = steps, batch_size, world, last
        self.new_bad, self.bad, self.wait_seconds, self.shared = [], set(), 0.0, 0

    def __len__(self):
        return self.steps * self._batch_size * self._world

    def steps_from(self, start):
        return self.steps - start // (self._batch_size * self._world)

    def share_bad(self):
        new, self.shared, self.new_bad = self.new_bad, self.shared + 1, []
        return new

    def batches(self, epoch=0, start=0):
        for step in range(self.steps - self.steps_from(start), self.steps):
            targets = torch.zeros(self._batch_size, dtype=torch.int64)
            samples = (step + 1) * self._batch_size * self._world
            yield Batch(None, targets, 1.0, epoch + step / self.steps, samples)


def arguments(**values):
    options = {"batch_size": 4, "max_steps": 0, "print_freq": 10, "epochs": 1, "log_dir": None, "log_id": "0"}
    options.update(evaluate=False, resume=None, arch="net", opt_level="O1", amp=True, synthetic=True, data=None)
    options.update(per_class=None, accumulate=1, profile=0, save_steps=0)
    return types.SimpleNamespace(**dict(options, notices=[], **values))


def make_log(ranks=None, **options):
    card = types.SimpleNamespace(ranks=ranks or FakeRanks(), torch_device=torch.device("cpu"), notices=["a notice"])
    card.synchronize, card.memory_gib, card.type, card.name = (lambda: None), (lambda: 1.5), "cpu", "a processor"
    args = arguments(**options)
    # The runs of a test are one process, its ranks threads: one would put back the stand-in of another.
    with PATCHING, mock.patch.object(checkpoint, "lock", lambda *words: None):
        log = Log(card, args, "Network")
    log.start(args, types.SimpleNamespace(label="float32", skipped=0))
    return log


def train(log, loader, number=0, samples=0, losses=None):
    """Train an epoch; `losses` gives the loss of each step. Return the stop signals of its steps."""
    signals = []
    for step, batch in enumerate(log.steps(loader, number, samples)):
        logits = torch.eye(8)[batch.targets]
        signals.append(log.step(torch.tensor(losses[step] if losses else 2.0), logits, batch, 0.1))
    return signals


# ---- runs that are killed, and what they leave


def free_port():
    """Return a port of this host that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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
    warm_up = ["--warmup-epochs", "1"] if bundle != "PnasNet5Large" else []
    fixed = ["--device", "cpu", "--data", data, "--output-dir", out, "-j", "2", "-b", "4", "--cpu-batch-size", "4"]
    fixed += ["--epochs", "2", "-p", "1", "--lr", "0.02", "--on-save-error", "stop"]
    return [str(word) for word in [*small(bundle), *warm_up, *fixed, *more]]


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


PATCHING = threading.Lock()
LIMIT = 900  # seconds until a wait counts as a hang: a machine may be slow


def wait_for(condition, process=None, seconds=LIMIT):
    """Wait until `condition()` is true and return what it gave; fail after `seconds` or when `process` has ended."""
    deadline = time.time() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.time() < deadline, "waited in vain for {} seconds".format(seconds)
        assert process is None or process.poll() is None, "the run has ended before"
        time.sleep(0.01)


def _as_from_a_terminal():
    """Begin a session; heed signals that the shell may have told pytest, in the background, to ignore."""
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def catches(pid, signum):
    """Return whether the process has a handler of its own for the signal."""
    with open("/proc/{}/status".format(pid)) as file:
        return bool(int(re.search(r"SigCgt:\s*(\w+)", file.read()).group(1), 16) >> (signum - 1) & 1)


class Job:
    """A run in processes of its own, whose every descendant can be found."""

    def __init__(self, words, log, **environment):
        self.log, self._mark = pathlib.Path(str(log)), "CHAOS_MARK={}".format(uuid.uuid4().hex)
        key, value = self._mark.split("=")
        variables = dict(os.environ, PYTHON=sys.executable, PYTHON_EXEC=sys.executable, OMP_NUM_THREADS="1")
        variables.update(environment, **{key: value})
        with open(str(self.log), "wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words], env=variables, stdout=file, stderr=file, preexec_fn=_as_from_a_terminal
            )

    def text(self):
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern):
        """Wait until it has printed `pattern` and return the match."""
        return wait_for(lambda: re.search(pattern, self.text()), self.process)

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

        return wait_for(find, self.process)

    def end(self, seconds=LIMIT):
        """Wait for the end, at most `seconds`; check that nothing is left, and return the exit status."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("no end within {} seconds\n{}".format(seconds, self.text())) from None
        try:
            wait_for(lambda: not self.alive(), seconds=60)
        except AssertionError:
            left = self.alive()
            self.kill()
            raise AssertionError("left behind: {}".format(left)) from None
        assert "traceback" not in self.text().lower(), self.text()
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
            [sys.executable, "-u", str(ROOT / "tests" / "reliability" / "server.py"), str(ROOT / bundle)],
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
        """End the server; that its input is closed would not do: processes forked since then have it open too."""
        self._server.kill()
        self._server.wait()
