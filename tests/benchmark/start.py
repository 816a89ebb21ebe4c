"""Seconds from the first line of the script to the first training step, with 100,000 files in 1000 class folders."""

import subprocess
import tempfile
import time

from tests.benchmark import data, measure
from tests.helpers import ROOT

CLASSES, FILES = 1000, 100000


def seconds_to_first_step(folder):
    """Run train_performance_1p.sh on `folder` for one step."""
    script = str(ROOT / "MnasNet" / "test" / "train_performance_1p.sh")
    command = ["bash", script, "--device=cpu", "--data_path=" + folder, "--max_steps=1", "--print-freq", "1"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True)
    found = None
    for line in process.stdout:
        if found is None and line.startswith("Epoch: [0]"):
            found = time.perf_counter() - started
    assert process.wait() == 0
    return found


def run():
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        data.write(folder, "train", CLASSES, FILES)
        rows = [[name, "{:.1f}".format(seconds_to_first_step(folder))] for name in ("first start", "second", "third")]
    print(measure.table(["MnasNet, {:,} files".format(FILES), "seconds"], rows))
