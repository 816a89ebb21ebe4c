"""Training steps on the CPU: ours, and torchvision's or timm's network of the same name in its usual forms."""

import contextlib
import copy

import timm
import torch
from torch.nn.functional import cross_entropy

from common import device, input
from tests.benchmark import measure
from tests.bundles import imported

# Bundle: batch, side of the images, rounds, whose network, options of ours that leave out what theirs has not.
NETWORKS = {
    "MnasNet": (32, 224, 3, "torchvision", ()),
    "SPNASNet_100": (32, 224, 3, "timm", ()),
    "ShuffleNetV2": (32, 224, 5, "torchvision", ()),
    "SPACH-SMLP": (8, 224, 3, "ours in torch's forms", ()),  # no package has the network
    "PnasNet5Large": (2, 331, 3, "timm", ("--aux-weight", "0")),
}


def ours(bundle, batch, images, targets, options):
    """Return (a function that does one step as main.py does, the network as torch has it)."""
    with imported(bundle, "main") as main:
        args = main.parse_args(["--device", "cpu", "--synthetic", "--amp", "--batch-size", str(batch), *options])
        card = device.Device(args)
        model = main.build_model(args, 1000, None, card, None)
        optimizer, _ = main.build_optimizer(args, card, model)
        stock_args = main.parse_args(["--device", "cpu", "--synthetic", "--memory-format", "contiguous", *options])
        stock = main.build_model(stock_args, 1000, None, device.Device(stock_args), None)
    precision = device.Precision(card, args, model, optimizer)
    images = card.prepare(images)

    def step():
        with precision.autocast():
            loss = cross_entropy(model.train()(images), targets)
        precision.step(loss, optimizer)

    return step, stock


def theirs(model, images, targets, adam, channels_last=False, bfloat16=False, compiled=False):
    """Return a function that does one step of `model` in torch's own way."""
    model.train()
    if channels_last:
        model, images = (item.to(memory_format=torch.channels_last) for item in (model, images))
    optimizer = torch.optim.AdamW(model.parameters()) if adam else torch.optim.SGD(model.parameters(), 0.01, 0.9)
    mixed = torch.autocast("cpu", dtype=torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    forward = torch.compile(model) if compiled else model

    def step():
        optimizer.zero_grad()
        with mixed:
            loss = cross_entropy(forward(images), targets)
        loss.backward()
        optimizer.step()

    return step


def build(owner, bundle, stock):
    """Return a function that builds the peer's network, without pretrained weights."""
    if owner == "timm":
        return lambda: timm.create_model({"SPNASNet_100": "spnasnet_100", "PnasNet5Large": "pnasnet5large"}[bundle])
    if owner == "torchvision":
        zoo = input.import_torchvision().models
        return zoo.mnasnet1_0 if bundle == "MnasNet" else zoo.shufflenet_v2_x1_0
    return lambda: copy.deepcopy(stock)


def run(bundle=None, compiled=False):
    """Print a table for `bundle`, or for each; `compiled` adds torch.compile, which takes minutes to start."""
    for name in [bundle] if bundle else NETWORKS:
        batch, side, rounds, owner, options = NETWORKS[name]
        images, targets = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))
        our_step, stock = ours(name, batch, images, targets, options)
        make, adam = build(owner, name, stock), name == "SPACH-SMLP"
        forms = {"ours": our_step}
        forms[owner + ", default"] = theirs(make(), images, targets, adam)
        forms[owner + ", channels_last"] = theirs(make(), images, targets, adam, True)
        forms[owner + ", channels_last, bfloat16"] = theirs(make(), images, targets, adam, True, True)
        if compiled:
            forms[owner + ", the same compiled"] = theirs(make(), images, targets, adam, True, True, True)
        rows = measure.rates(measure.in_turns(forms, rounds), batch, "ours")
        headers = ["{}, batch {}, {} pixels".format(name, batch, side), "images/s", "ours is faster by"]
        print(measure.table(headers, rows) + "\n", flush=True)
