"""The benchmark of a GPU runs everywhere, without one at a size that shows no speed; that of recipes finds them."""

import re
import subprocess
import sys

import pytest
import torch

from tests.benchmark import __main__ as benchmark
from tests.benchmark import recipes
from tests.helpers import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command takes minutes")
@pytest.mark.slow  # trainings of several forms, each in a process of its own
def test_gpu_benchmark_runs_without_a_gpu():
    command = [sys.executable, "-m", "tests.benchmark", "cuda.ShuffleNetV2"]
    printed = subprocess.run(command, cwd=str(ROOT), stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    rows = dict(re.findall(r"^\| ([\w ]+) \| ([\d.]+) \|", printed, re.MULTILINE))
    assert set(rows) == {"ours", "torchvision", "in memory", "JPEG files", "pack"}
    assert all(float(rate) > 0 for rate in rows.values())
    assert "no GPU: toy sizes, which show no speed" in printed


def test_both_recipes_of_a_bundle_are_found_and_fit_the_digits():
    """By the root 0.016 at 8 x 256 images is 0.002 at 32; an average over 3.6 % of 450 epochs spans 25 of 702 steps."""
    found = {bundle: recipes.recipes(bundle) for bundle in recipes.BUNDLES}
    by_root = {bundle: [recipes.scaling(bundle, flags, 0.5) for flags in found[bundle].values()] for bundle in found}
    assert recipes.scaling("MnasNet", "", 1) == ["--learning_rate=0.0109"]
    assert by_root == {
        "MnasNet": [["--learning_rate=0.124"], ["--learning_rate=0.002"]],
        "SPNASNet_100": [["--learning_rate=0.05"], ["--learning_rate=0.002", "--ema-decay=0.961"]],
        "ShuffleNetV2": [["--learning_rate=0.25"], ["--learning_rate=0.0884"]],
    }
    assert "--optimizer rmsprop" in found["MnasNet"]["for higher accuracy"]


@pytest.mark.parametrize("name", ["nonsense", "step.NoNet", "start.MnasNet", "recipes.PnasNet5Large"])
def test_a_comparison_that_is_not_there_is_refused_before_anything_is_measured(name, capsys):
    with pytest.raises(SystemExit) as refused:
        benchmark.main(["loader", name])
    assert refused.value.code == 2 and "there is no " + name in capsys.readouterr().err


def test_a_network_can_be_named_where_the_recipes_have_it():
    assert {name for name in benchmark.NAMES if name.startswith("recipes.")} == {
        "recipes." + n for n in recipes.BUNDLES
    }
