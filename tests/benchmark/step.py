"""Training steps on the CPU: ours, and torchvision's or timm's network of the same name in its usual forms."""

import contextlib
import types

import timm
import torch
import torchvision
from torch.nn.functional import cross_entropy

from common import arguments, device, precision
from tests.benchmark import measure
from tests.helpers import imported

# Bundle: batch, side of the images, rounds, whose network, options of ours that leave out what theirs has not.
NETWORKS = {
    "MnasNet": (32, 224, 3, "torchvision", ()),
    "SPNASNet_100": (32, 224, 3, "timm", ()),
    "ShuffleNetV2": (32, 224, 5, "torchvision", ()),
    "SPACH-SMLP": (8, 224, 3, "smlpnet_tiny", ()),  # no package has the network
    "PnasNet5Large": (2, 331, 3, "timm", ("--aux-weight", "0")),
}


def sample(bundle):
    """Return random images and targets of the size that the bundle is timed with."""
    batch, side, *_ = NETWORKS[bundle]
    return torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))


def ours(bundle):
    """Return a function that does one step as main.py does."""
    with imported(bundle, "main") as main:
        options = ["--device", "cpu", "--synthetic", "--amp", *NETWORKS[bundle][4]]
        args = arguments.parse(main.build_parser(), options)
        card = device.Device(args)
        model = main.build_model(args, 1000, None, card, None)
        optimizer, _ = main.build_optimizer(args, card, model)
    mixed = precision.Precision(card, args, model, optimizer)
    batch = types.SimpleNamespace(weight=1.0, ends_step=True)
    images, targets = sample(bundle)
    images = card.prepare(images)

    def step():
        with mixed.autocast(model, batch):
            loss = cross_entropy(model.train()(images), targets)
        mixed.step(loss, optimizer, batch)

    return step


def their_network(bundle):
    """Return the peer's network, without pretrained weights."""
    owner = NETWORKS[bundle][3]
    if owner == "timm":
        return timm.create_model({"SPNASNet_100": "spnasnet_100", "PnasNet5Large": "pnasnet5large"}[bundle])
    if owner == "torchvision":
        zoo = torchvision.models
        return zoo.mnasnet1_0() if bundle == "MnasNet" else zoo.shufflenet_v2_x1_0()
    with imported(bundle) as models:
        return models.smlpnet_tiny()


def theirs(bundle, channels_last=False, bfloat16=False, compiled=False):
    """Return a function that does one step of the peer's network in torch's own way."""
    model, (images, targets) = their_network(bundle).train(), sample(bundle)
    if channels_last:
        model, images = (item.to(memory_format=torch.channels_last) for item in (model, images))
    adam = bundle == "SPACH-SMLP"
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


def run(bundle=None, compiled=False):
    """Print a table for `bundle`, or for each; `compiled` adds torch.compile, which takes minutes to start."""
    for name in [bundle] if bundle else NETWORKS:
        batch, side, rounds, owner, _ = NETWORKS[name]
        forms = {"ours": (ours, name)}
        forms[owner + ", default"] = theirs, name
        forms[owner + ", channels_last"] = theirs, name, True
        if compiled:
            forms[owner + ", channels_last, compiled"] = theirs, name, True, False, True
        if device.processor()[1]:  # elsewhere it takes ten times as long
            forms[owner + ", channels_last, bfloat16"] = theirs, name, True, True
            if compiled:
                forms[owner + ", channels_last, bfloat16, compiled"] = theirs, name, True, True, True
        rows = measure.rates(measure.in_turns(forms, rounds), batch, "ours")
        headers = ["{}, batch {}, {} pixels".format(name, batch, side), "images/s", "ours is faster by"]
        print(measure.table(headers, rows) + "\n", flush=True)
