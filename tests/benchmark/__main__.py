"""Print the tables of all comparisons, or of those that are named."""

import argparse
import importlib
import os
import sys

from tests.benchmark import measure
from tests.helpers import BUNDLES

COMPARISONS = {
    "loader": "images/s of the loaders",
    "step": "images/s of a training step, five networks",
    "script": "FPS of train_performance_1p.sh against a bare loop",
    "ranks": "images/s of two ranks against a bare loop of DistributedDataParallel",
    "start": "seconds to the first step with 100,000 files",
    "evaluate": "images/s of an evaluation",
    "accumulate": "images/s and memory of steps of 4 x 32 images against steps of 128",
    "recipes": "Acc@1 on the digits by the recipes of the scripts and of the READMEs, three networks, 45 minutes",
    "cuda": "images/s of a training step on a GPU, five networks",
}
FOR_ONE_NETWORK = ("step", "script", "ranks", "accumulate", "cuda")
NAMES = {*COMPARISONS, *("{}.{}".format(name, bundle) for name in FOR_ONE_NETWORK for bundle in BUNDLES)}
NAMES.update("recipes." + bundle for bundle in ("MnasNet", "SPNASNet_100", "ShuffleNetV2"))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    text = "; ".join("{}: {}".format(*item) for item in COMPARISONS.items())
    parser.add_argument("names", nargs="*", help=text + ". step.MnasNet is one network of `step`")
    parser.add_argument("--compile", action="store_true", help="`step` and `cuda` also time torch.compile")
    args = parser.parse_args(argv)
    for name in set(args.names) - NAMES:
        parser.error(
            "there is no {}; --help lists them; with a network: {}, recipes".format(name, ", ".join(FOR_ONE_NETWORK))
        )
    os.environ["PYTHON"] = sys.executable  # for the scripts
    print(measure.machine(), flush=True)
    for name in args.names or COMPARISONS:
        comparison, _, network = name.partition(".")
        module = importlib.import_module("tests.benchmark." + comparison)
        details = [network] * bool(network)
        options = {"compiled": True} if args.compile and comparison in ("step", "cuda") else {}
        print("\n`python -m tests.benchmark {}{}`\n".format(name, " --compile" * bool(options)), flush=True)
        module.run(*details, **options)


if __name__ == "__main__":
    main()
