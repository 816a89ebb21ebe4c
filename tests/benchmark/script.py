"""FPS that test/train_performance_1p.sh reports, against the same steps in a bare loop without log and launcher."""

import re
import statistics
import subprocess
import sys

from tests.benchmark import measure
from tests.bundles import ROOT

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


def _rate(command, pattern):
    output = subprocess.run(command, stdout=subprocess.PIPE, cwd=str(ROOT), check=True, universal_newlines=True).stdout
    return float(re.search(pattern, output).group(1))


def run(bundle="MnasNet"):
    """Print the table."""
    script = ["bash", str(ROOT / bundle / "test" / "train_performance_1p.sh"), "--device=cpu"]
    script += ["--batch_size={}".format(BATCH), "--max_steps={}".format(STEPS)]
    bare = [sys.executable, "-c", BARE.format(bundle=bundle, batch=BATCH, steps=STEPS)]
    rates = {"train_performance_1p.sh": [], "bare loop": []}
    for _ in range(ROUNDS):
        rates["train_performance_1p.sh"].append(_rate(script, r"Final Performance images/sec : ([\d.]+)"))
        rates["bare loop"].append(_rate(bare, r"FPS ([\d.]+)"))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        [name, "{:.1f}".format(value), "{:.3f}".format(value / medians["bare loop"])] for name, value in medians.items()
    ]
    print(measure.table([bundle, "images/s", "share of the bare loop"], rows))
