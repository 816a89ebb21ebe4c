"""Training with main.py in two ranks on the CPU, against a bare loop of DistributedDataParallel over its network."""

import sys
import time

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from common import arguments, device, precision
from tests.benchmark import script
from tests.helpers import ROOT, imported

RANKS, BATCH, STEPS, UNTIMED = 2, 16, 40, 10  # the batch is a rank's
OPTIONS = ["--device", "cpu", "--synthetic", "--amp", "--no-save", "-b", str(BATCH), "--max-steps", str(STEPS)]


def bare(bundle):
    """Be one of the ranks that torchrun has started: do the steps; rank 0 prints the images/s of all."""
    with imported(bundle, "main") as main:
        args = arguments.parse(main.build_parser(), OPTIONS)
        card = device.Device(args)
        model = main.build_model(args, 1000, None, card, None).train()
        optimizer, _ = main.build_optimizer(args, card, model)
    precision.Precision(card, args, model, optimizer)  # gives the network its layers for bfloat16
    bfloat16 = device.processor()[1]  # elsewhere main.py computes in float32
    replica = torch.nn.parallel.DistributedDataParallel(model)
    images = card.prepare(torch.randn(BATCH, 3, args.image_size, args.image_size))
    targets = torch.randint(1000, (BATCH,))
    for number in range(STEPS):
        if number == UNTIMED:
            dist.barrier()
            started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = cross_entropy(replica(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    if card.ranks.is_rank0:
        print("FPS", RANKS * BATCH * (STEPS - UNTIMED) / (time.perf_counter() - started), flush=True)
    dist.destroy_process_group()


def run(bundle="MnasNet"):
    """Print the table."""
    cards = ",".join(map(str, range(RANKS)))
    training = [sys.executable, str(ROOT / bundle / "main.py"), *OPTIONS, "--device-list", cards]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    commands = {"main.py": (training, r'"fps": ([\d.]+)')}
    commands["bare loop"] = [*torchrun, "-m", "tests.benchmark.ranks", bundle], r"FPS ([\d.]+)"
    script.compare("{}, {} ranks".format(bundle, RANKS), commands)


if __name__ == "__main__":
    bare(sys.argv[1])
