"""One short run of each bundle on two ranks, and what it must leave: log, weights, checkpoints, a run to go on with."""

import json
import os
import re

import pytest
import torch

from tests import helpers
from tests.helpers import BUNDLES, LINE, ROOT, main_py, run, small

MODULES = 15  # of common/ that a training run loads
EACH_BUNDLE = pytest.mark.parametrize("bundle", BUNDLES)


class ShortRun:
    """A run of one epoch of two steps; `folder` has its checkpoints, the logs, and what `rank_weights.py` writes."""

    def __init__(self, bundle, ranks, data, folder):
        self.bundle, self.folder = bundle, folder
        flags = ["--data", data, "--workers=1", "--device=cpu", "--output-dir", folder, "--log-dir", folder, "-p", "1"]
        self.flags = [*flags, *small(bundle), "-b", "4"]
        cards = ["--device-list", ",".join(map(str, range(ranks)))]
        command = [os.environ["PYTHON"], ROOT / "tests" / "bundles" / "rank_weights.py", folder, ROOT / bundle]
        process = run([*command, *self.flags, *cards, "--epochs=1", "--max-steps=2"], timeout=600)
        assert process.returncode == 0, process.stdout + process.stderr
        self.screen, self.errors = process.stdout, process.stderr
        self.weights = [(folder / "rank{}".format(rank)).read_text() for rank in range(ranks)]


@pytest.fixture(scope="session")
def short_run(few_digits, tmp_path_factory):
    """A function that returns the `ShortRun` of a bundle on so many ranks."""
    made = {}

    def make(bundle, ranks=2):
        if (bundle, ranks) not in made:
            made[bundle, ranks] = ShortRun(bundle, ranks, few_digits, tmp_path_factory.mktemp("run"))
        return made[bundle, ranks]

    return make


@EACH_BUNDLE
def test_both_ranks_end_with_the_same_weights(bundle, short_run):
    finished = short_run(bundle)
    assert len(finished.weights) == 2 and len(set(finished.weights)) == 1
    assert "Warning" not in finished.errors  # as torch's, of gradients whose strides are not their weights'


@EACH_BUNDLE
def test_a_training_run_loads_few_modules_of_common(bundle, short_run):
    loaded = (short_run(bundle).folder / "modules").read_text().split()
    assert 5 < len(loaded) <= MODULES, loaded
    assert not {"common.export", "common.pack"} & set(loaded)


@EACH_BUNDLE
def test_the_log_has_a_line_for_each_step_and_the_accuracy(bundle, short_run):
    finished = short_run(bundle)
    log = (finished.folder / "train_0.log").read_text().splitlines()
    steps = [line for line in log if line.startswith("Epoch: [")]
    assert len(steps) == 2 and all(LINE.fullmatch(line) for line in steps)
    assert len([line for line in log if re.fullmatch(r" \* Acc@1 [\d.]+ Acc@5 [\d.]+", line)]) == 1
    assert set(log) <= set(finished.screen.splitlines())


@EACH_BUNDLE
def test_metrics_have_the_arguments_the_steps_and_the_accuracy(bundle, short_run):
    folder = short_run(bundle).folder
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = records[0]
    assert first["kind"] == "run" and first["args"]["batch_size"] == 4 and first["torch"] == torch.__version__
    steps = [(record["epoch"], record["step"]) for record in records if record["kind"] == "train"]
    assert steps == [(0, 1), (0, 2)]
    (accuracy,) = [record for record in records if record["kind"] == "eval"]
    assert (accuracy["images"], accuracy["unreadable"]) == (30, 0)


@EACH_BUNDLE
def test_the_checkpoints_are_there_and_hold_what_a_run_needs(bundle, short_run):
    folder = short_run(bundle).folder
    names = {path.name for path in folder.glob("*.pth.tar*")}
    assert {"checkpoint.pth.tar", "model_best.pth.tar"} <= names <= set(helpers.checkpoint.NAMES)
    content = torch.load(str(folder / "checkpoint.pth.tar"), weights_only=True)
    assert content["classes"] == [str(digit) for digit in range(10)]
    assert (content["epoch"], content["samples"], content["args"]["batch_size"]) in ((1, 0, 4), (0, 16, 4))
    assert {"param_groups", "state"} <= set(content["optimizer"]) and content["state_dict"]


@EACH_BUNDLE
def test_one_rank_measures_the_digits_that_two_have_measured(bundle, short_run, tmp_path):
    finished = short_run(bundle)
    words = [*finished.flags, "-b", "7", "--evaluate", "--resume", finished.folder / "checkpoint.pth.tar"]
    process = main_py(bundle, *words, "--log-dir", tmp_path)
    assert process.returncode == 0, process.stderr
    measured = re.search(r"^ \* Acc@1 [\d.]+ Acc@5 [\d.]+$", finished.screen, re.MULTILINE).group()
    assert measured in process.stdout.splitlines()


@EACH_BUNDLE
def test_a_run_of_two_ranks_goes_on_with_one(bundle, short_run, tmp_path):
    finished = short_run(bundle)
    words = [*finished.flags, "--epochs=2", "--max-steps=5", "--eval-freq=0", "--output-dir", tmp_path]
    words += ["--log-dir", tmp_path, "--resume", finished.folder / "checkpoint.pth.tar"]
    process = main_py(bundle, *words)
    assert process.returncode == 0, process.stderr
    assert re.search(r"resumed \S+checkpoint.pth.tar: epoch \d, \d+ samples done", process.stdout)
    assert len(re.findall(r"^Epoch: \[", process.stdout, re.MULTILINE)) == 1


@pytest.mark.slow
@EACH_BUNDLE
def test_eight_ranks_end_with_the_same_weights_and_measure_what_one_does(bundle, short_run, tmp_path):
    finished = short_run(bundle, 8)
    assert len(finished.weights) == 8 and len(set(finished.weights)) == 1
    words = [*finished.flags, "-b", "7", "--evaluate", "--resume", finished.folder / "checkpoint.pth.tar"]
    process = main_py(bundle, *words, "--log-dir", tmp_path)
    assert process.returncode == 0, process.stderr
    measured = re.search(r"^ \* Acc@1 [\d.]+ Acc@5 [\d.]+$", finished.screen, re.MULTILINE).group()
    assert measured in process.stdout.splitlines()
