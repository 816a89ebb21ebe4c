"""Images/s of an evaluation: ours against timm's validate.py with its defaults, same folder, network and weights."""

import os
import shutil
import tempfile
import types

import timm
import timm.data
import torch

from common import arguments, device, pack, weights
from tests.benchmark import data, measure
from tests.helpers import imported

CLASSES, IMAGES, BATCH, WORKERS = 8, 128, 64, 2


def ours(folder, path):
    """Return a function that measures Acc@1 as main.py does."""
    with imported("SPNASNet_100", "main") as main:
        options = ["--data", folder, "--evaluate", "--device", "cpu", "--workers", str(WORKERS)]
        options += ["--batch-size", str(BATCH), "--resume", path]
        args = arguments.parse(main.build_parser(), options)
        card = device.Device(args)
        _, loader = main.build_loaders(args, card, None)
        log = types.SimpleNamespace(line=lambda text: None)
        model = main.build_model(args, CLASSES, weights.read(path), card, log)
        log = types.SimpleNamespace(
            batches=lambda loader: loader.batches(),
            evaluation=lambda epoch, loader, counts: (100 * counts[:, 0].sum().item() / len(loader),),
        )
        return lambda: main.evaluate(loader, model, card, log, 0)


def timms(folder, path):
    """Return the loop of timm's validate.py, which its package lacks; it returns Acc@1."""
    model = timm.create_model("spnasnet_100", num_classes=CLASSES).eval()
    model.load_state_dict(torch.load(path))
    loader = timm.data.create_loader(
        timm.data.create_dataset("", folder + "/val"),
        input_size=(3, 224, 224),
        batch_size=BATCH,
        num_workers=WORKERS,
        interpolation="bilinear",
        crop_pct=0.875,
        device=torch.device("cpu"),
        persistent_workers=True,
    )

    def measure_accuracy():
        correct = count = 0
        with torch.inference_mode():
            for images, targets in loader:
                logits = model(images)
                torch.nn.functional.cross_entropy(logits, targets)
                correct += timm.utils.accuracy(logits, targets, topk=(1, 5))[0].item() * len(targets)
                count += len(targets)
        return correct / count

    return measure_accuracy


def run(rounds=3):
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        data.write(folder, "train", CLASSES, CLASSES, files=CLASSES)
        data.write(folder, "val", CLASSES, IMAGES)
        path = os.path.join(folder, "weights.pth")
        torch.manual_seed(0)
        torch.save(timm.create_model("spnasnet_100", num_classes=CLASSES).state_dict(), path)
        pack.main([folder, folder + "-raw"])
        forms = {"ours": (ours, folder, path), "ours, pack of raw pixels": (ours, folder + "-raw", path)}
        turns = measure.in_turns(dict(forms, **{"timm's validate": (timms, folder, path)}), rounds)
        shutil.rmtree(folder + "-raw")
    rows = measure.rates(turns, IMAGES, "ours")
    print(measure.table(["SPNASNet_100, evaluation", "images/s", "ours is faster by"], rows))
    print("\nAcc@1 " + ", ".join("{:.3f}".format(turn.result) for turn in turns.values()))
