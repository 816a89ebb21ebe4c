"""Acc@1 on the digits: the recipe of the scripts against the first of "Higher accuracy" in the README, equal epochs."""

import pathlib
import re
import statistics
import tempfile
import time

from tests.benchmark import measure
from tests.helpers import ROOT, copy_bundle, run_script
from tests.tools import sample_data

BUNDLES, SEEDS, EPOCHS, BATCH = ("MnasNet", "SPNASNet_100", "ShuffleNetV2"), 5, 15, 32
IMAGENET = 1281167  # images in train/
# For both recipes. A digit that is mirrored, or of which a tenth is left, is another one.
DIGITS = ["--image-size=64", "--crop-scale=0.6", "--flip=0", "--warmup-epochs=1", "--device=cpu", "--no-save"]
DIGITS += ["--batch_size={}".format(BATCH), *("--{}={}".format(name, EPOCHS) for name in ("epochs", "eval-freq"))]


def recipes(bundle):
    """Return {name of a recipe: its flags behind train_full_8p.sh}."""
    text = (ROOT / bundle / "README.md").read_text(encoding="utf-8").partition("\n## Higher accuracy\n")[2]
    best = re.search(r"^bash test/train_full_8p\.sh --data_path=\S+ (.*)$", text, re.MULTILINE).group(1)
    return {"of the scripts": "", "for higher accuracy": best}


def scaling(bundle, flags, power):
    """Return flags that scale a recipe to the digits: its learning rate by the batches' ratio to the `power`.

    An average of the weights spans the same share of the run.
    """
    words = (ROOT / bundle / "test" / "train_full_8p.sh").read_text() + " " + flags

    def value(option):
        return float(([0] + re.findall(r"--(?:{})[= ](\S+)".format(option), words))[-1])

    batch = 8 * value("batch[-_]size")
    more = ["--learning_rate={:.3g}".format(value("lr|learning_rate") * (BATCH / batch) ** power)]
    if value("ema-decay"):
        shorter = value("epochs") * IMAGENET / batch / (EPOCHS * sample_data.TRAIN / BATCH)
        more.append("--ema-decay={:.3g}".format(value("ema-decay") ** shorter))
    return more


def accuracy(folder, flags, seed):
    """Train the bundle in `folder` on the digits next to it; return Acc@1 after the last epoch."""
    options = ["--data_path={}".format(folder.parent / "digits"), "--rank_size=1", *flags, "--seed", seed]
    process = run_script(folder, "full_8p", *options)
    assert process.returncode == 0, process.stdout + process.stderr
    return float(re.search(r"Final Train Accuracy : ([\d.]+)", process.stdout).group(1))


def run(*bundles):
    """Print a row for each recipe of `bundles`.

    The learning rate is the better of two, by a seed that does not count: linear in the batch, or in its root.
    """
    rows = []
    with tempfile.TemporaryDirectory() as place:
        sample_data.write(pathlib.Path(place, "digits"))
        for bundle in bundles or BUNDLES:
            folder = copy_bundle(bundle, pathlib.Path(place))
            for name, flags in recipes(bundle).items():
                started, words = time.perf_counter(), [*flags.split(), *DIGITS]
                choices = [scaling(bundle, flags, power) for power in (1, 0.5)]
                tried = [accuracy(folder, words + more, SEEDS) for more in choices]
                more = choices[tried.index(max(tried))]
                found = [accuracy(folder, words + more, seed) for seed in range(SEEDS)]
                numbers = statistics.mean(found), statistics.stdev(found), time.perf_counter() - started
                texts = [" ".join(map("{:.1f}".format, values)) for values in (tried, found)]
                shown = "`{}`".format(" ".join([flags, "DIGITS", *more]).strip())
                rows.append([bundle, name, shown, *texts, *map("{:.1f}".format, numbers)])
    print("All behind `train_full_8p.sh --rank_size=1`; DIGITS is `{}`.\n".format(" ".join(DIGITS)))
    seeds = ["Acc@1 of seed {} at two rates".format(SEEDS), "of seeds 0 to {}".format(SEEDS - 1)]
    print(measure.table(["bundle", "recipe", "flags", *seeds, "mean", "deviation", "seconds"], rows))
