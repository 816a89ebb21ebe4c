"""Steps of 4 x 32 images (`--accumulate`) against steps of 128, through main.py: images/s, and the process's memory."""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from tests.benchmark import measure
from tests.helpers import ROOT

FORMS, SIDE, STEPS, ROUNDS = ("--batch-size 128", "--batch-size 32 --accumulate 4"), 224, 6, 3


def train(bundle, flags):
    """Return (images/s, most memory in GiB) of a training on synthetic images."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / bundle / "main.py"), *flags.split(), "--device", "cpu", "--synthetic"]
        command += ["--amp", "--no-save", "--image-size", str(SIDE), "--max-steps", str(STEPS), "--log-dir", folder]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        lines = list(map(json.loads, (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()))
    return lines[-1]["fps"], max(line.get("memory_gib", 0) for line in lines)


def run(*bundles):
    """Print a table for each of `bundles`; trainings of both forms take turns, and their medians count."""
    for bundle in bundles or ("SPACH-SMLP", "MnasNet"):
        turns = [[train(bundle, flags) for flags in FORMS] for _ in range(ROUNDS)]
        medians = [[statistics.median(values) for values in zip(*form)] for form in zip(*turns)]
        rows = [
            [flags, "{:.1f}".format(fps), "{:.3f}".format(fps / medians[0][0]), "{:.2f}".format(memory)]
            for flags, (fps, memory) in zip(FORMS, medians)
        ]
        headers = ["{}, {} pixels".format(bundle, SIDE), "images/s", "share of the first", "most memory, GiB"]
        print(measure.table(headers, rows) + "\n", flush=True)
