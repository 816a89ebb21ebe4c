"""FPS that test/train_performance_1p.sh reports, against the same steps in a bare loop without log and launcher."""

import re
import statistics
import subprocess
import sys

from tests.benchmark import measure
from tests.helpers import ROOT

BATCH, STEPS, ROUNDS = 16, 30, 3

BARE = """
import time
from tests.benchmark import step
step.NETWORKS["{bundle}"] = {batch}, 224, 0, "", ()
step = step.ours("{bundle}")
for number in range({steps}):
    if number == 5:
        started = time.perf_counter()
    step()
print("FPS", {batch} * ({steps} - 5) / (time.perf_counter() - started))
"""


def compare(title, commands):
    """Run `commands`, {name: (command, pattern of the images/s in what it prints)}, in turns; print a table.

    The last of them is the bare loop.
    """
    rates = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, (command, pattern) in commands.items():
            process = subprocess.run(command, stdout=subprocess.PIPE, cwd=str(ROOT), check=True)
            rates[name].append(float(re.search(pattern, process.stdout.decode()).group(1)))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    bare = list(medians.values())[-1]
    rows = [[name, "{:.1f}".format(value), "{:.3f}".format(value / bare)] for name, value in medians.items()]
    print(measure.table([title, "images/s", "share of the bare loop"], rows))


def run(bundle="MnasNet"):
    """Print the table."""
    script = ["bash", str(ROOT / bundle / "test" / "train_performance_1p.sh"), "--device=cpu"]
    script += ["--batch_size={}".format(BATCH), "--max_steps={}".format(STEPS)]
    bare = [sys.executable, "-c", BARE.format(bundle=bundle, batch=BATCH, steps=STEPS)]
    commands = {"train_performance_1p.sh": (script, r"Final Performance images/sec : ([\d.]+)")}
    compare(bundle, dict(commands, **{"bare loop": (bare, r"FPS ([\d.]+)")}))
