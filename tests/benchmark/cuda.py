"""Training steps on a GPU, from images that it holds: ours, and the peer's network with AMP and channels_last.

The share of the roofline is the time that the card needs to move what eager PyTorch reads and writes in forward and
backward pass, as a share of the time of a step.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
import types

import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import arguments, device, precision
from tests.benchmark import data, measure, step
from tests.helpers import ROOT, imported

# Bundle: batch, side of the images, steps of a turn, options of ours that leave out what theirs has not.
NETWORKS = {
    "MnasNet": (512, 224, 20, ()),
    "SPNASNet_100": (512, 224, 20, ()),
    "ShuffleNetV2": (1024, 224, 20, ()),
    "SPACH-SMLP": (256, 224, 10, ()),
    "PnasNet5Large": (64, 331, 5, ("--aux-weight", "0")),
}
TOY = (2, 64, 1)  # batch, side and steps without a card: it shows that the command works, and no speed


def _size(bundle):
    return NETWORKS[bundle][:3] if torch.cuda.is_available() else TOY


def _turn(bundle, card_type, train):
    """Return a function that calls `train(images, targets)` for a turn; it returns the peak memory in GiB."""
    batch, side, steps = _size(bundle)
    images = torch.randn(batch, 3, side, side, device=card_type).to(memory_format=torch.channels_last)
    targets = torch.randint(1000, (batch,), device=card_type)

    def turn():
        for _ in range(steps):
            train(images, targets)
        if card_type == "cpu":
            return 0.0
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30

    return turn


def ours(bundle, *options):
    """Return a turn of steps as main.py does them."""
    main = imported(bundle, "main").__enter__()  # for good: torch.compile looks up the modules of what it compiles
    args = arguments.parse(main.build_parser(), ["--synthetic", "--amp", *NETWORKS[bundle][3], *options])
    card = device.Device(args)
    model = main.build_model(args, 1000, None, card, None).train()
    optimizer, _ = main.build_optimizer(args, card, model)
    mixed = precision.Precision(card, args, model, optimizer)
    batch = types.SimpleNamespace(weight=1.0, ends_step=True)
    replica = card.parallel(model)

    def train(images, targets):
        with mixed.autocast(replica, batch):
            loss = cross_entropy(replica(images), targets)
        mixed.step(loss, optimizer, batch)

    return _turn(bundle, card.type, train)


def theirs(bundle, dtype, is_compiled):
    """Return a turn of steps of the peer's network in torch's own way, tuned as its users do."""
    torch.backends.cudnn.benchmark = True
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    model = step.their_network(bundle).train().to(kind, memory_format=torch.channels_last)
    adam, options = bundle == "SPACH-SMLP", {"fused": True} if kind == "cuda" else {}
    optimizer = torch.optim.AdamW if adam else lambda *args, **options: torch.optim.SGD(*args, 0.01, 0.9, **options)
    optimizer = optimizer(model.parameters(), **options)
    scaler = torch.amp.GradScaler(kind, enabled=dtype is torch.float16)
    forward = torch.compile(model) if is_compiled else model

    def train(images, targets):
        optimizer.zero_grad()
        with torch.autocast(kind, dtype=dtype):
            loss = cross_entropy(forward(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return _turn(bundle, kind, train)


class _Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that operators read and write."""

    moved = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        if not operator.is_view:
            tensors = [item for item in tree_leaves((arguments, options, result)) if torch.is_tensor(item)]
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def traffic(bundle):
    """Return the bytes that a training step of the peer's network moves for an image, in eager mode."""
    _, side, _ = _size(bundle)
    kind, batch = "cuda" if torch.cuda.is_available() else "cpu", 8
    model = step.their_network(bundle).train().to(kind)
    images, targets = torch.randn(batch, 3, side, side, device=kind), torch.zeros(batch, dtype=torch.int64, device=kind)
    with _Traffic() as counter, torch.autocast(kind, dtype=torch.bfloat16):
        cross_entropy(model(images), targets).backward()
    return counter.moved / batch


def bandwidth():
    """Return the bytes per second that the device reads and writes when it copies memory."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(2**28 if kind == "cuda" else 2**22, device=kind)
    target, rates = torch.empty_like(source), []
    for _ in range(10):
        wait = torch.cuda.synchronize if kind == "cuda" else contextlib.nullcontext
        wait()
        started = time.perf_counter()
        target.copy_(source)
        wait()
        rates.append(2 * source.numel() * source.element_size() / (time.perf_counter() - started))
    return max(rates)


def fps(bundle, *source):
    """Return the images/s that a training with `main.py` reports; `source`: options that say what it trains on."""
    batch, side, steps = _size(bundle)
    command = [sys.executable, str(ROOT / bundle / "main.py"), *source, "--amp", "--no-save", "--eval-freq", "0"]
    command += ["--batch-size", str(batch), "--image-size", str(side), "--max-steps", str(3 * steps)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout
    return float(re.findall(r"FPS [\d.]+ \(([\d.]+)\)", output)[-1])


def inputs(bundle):
    """Print a table of what a training gets from images in memory, from JPEG files and from a pack."""
    batch, _, steps = _size(bundle)
    with tempfile.TemporaryDirectory() as folder:
        data.write(folder, "train", 8, 3 * steps * batch)
        pack = [sys.executable, "-m", "common.pack", folder, os.path.join(folder, "pack")]
        subprocess.run(pack, check=True, cwd=str(ROOT), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        sources = {"in memory": ["--synthetic"], "JPEG files": ["--data", folder], "pack": ["--data", pack[-1]]}
        rows = [[name, "{:.0f}".format(fps(bundle, *options))] for name, options in sources.items()]
    headers = ["{}, {} cores, images".format(bundle, len(os.sched_getaffinity(0))), "images/s"]
    print(measure.table(headers, rows), flush=True)


def run(only=None, compiled=False):
    """Print a table for the bundle `only`, or for each; `compiled` adds torch.compile, which takes minutes to start."""
    peak = bandwidth()
    has_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if has_gpu else "no GPU: toy sizes, which show no speed"
    print("{}; copies at {:.2f} TB/s\n".format(name, peak / 1e12), flush=True)
    for bundle in [only] if only else NETWORKS:
        batch, side, steps = _size(bundle)
        owner = step.NETWORKS[bundle][3]
        dtype = torch.float16 if has_gpu else torch.bfloat16
        forms = {"ours": (ours, bundle), owner: (theirs, bundle, dtype, False)}
        if compiled:
            forms["ours, --compile"] = ours, bundle, "--compile"
            forms[owner + ", compiled"] = theirs, bundle, dtype, True
        turns = measure.in_turns(forms, rounds=3, warm_up=2)
        floor = traffic(bundle) / peak
        rows = []
        for (form, rate, faster), turn in zip(measure.rates(turns, batch * steps, "ours"), turns.values()):
            share = "{:.0f} %".format(100 * floor * batch * steps / turn.seconds)
            rows.append([form, rate, faster, "{:.1f}".format(turn.result), share])
        headers = ["{}, batch {}, {} pixels".format(bundle, batch, side)]
        print(
            measure.table(headers + ["images/s", "ours is faster by", "peak GiB", "of the roofline"], rows), flush=True
        )
        print(flush=True)
    inputs(only or "MnasNet")
