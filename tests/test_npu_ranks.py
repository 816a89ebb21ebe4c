"""Several emulated cards over hccl: equal weights, each rank on its own card, checkpoints that go anywhere."""

import subprocess
import sys

import pytest

from tests.bundles import BUNDLES, ROOT
from tests.npu.harness import CHIPS, LONG, PYTHON, assert_all_on_the_cards, assert_fine, cards, run
from tests.test_scripts import small

# (bundle, chip, ranks); the long form is every bundle on 8 cards of either chip
SHORT = [
    ("MnasNet", "Ascend910B3", 8),
    ("ShuffleNetV2", "Ascend910A", 8),
    ("SPNASNet_100", "Ascend910A", 2),
    ("PnasNet5Large", "Ascend910B3", 2),
    ("SPACH-SMLP", "Ascend910A", 2),
]
JOBS = [(bundle, chip, 8) for bundle in BUNDLES for chip in CHIPS] if LONG else SHORT
FLAGS = [
    "-b",
    "4",
    "--amp",
    "--opt-level",
    "O1",
    "--loss-scale=1",
    "--lr=0.001",
    "--eval-freq=0",
    "--no-save",
    "--workers=0",
]


@pytest.mark.parametrize("bundle, chip, ranks", JOBS)
def test_weights_stay_equal_when_one_rank_overflows(bundle, chip, ranks, few_digits, tmp_path):
    steps = 10 if LONG or ranks == 8 else 3
    command = [ROOT / "tests" / "rank_weights.py", tmp_path, ROOT / bundle, "--data", few_digits, *FLAGS, *cards(ranks)]
    flags = [*small(bundle), "--epochs=9", "--max-steps={}".format(steps)]
    overflow = "{}:25".format(ranks - 1)  # on the last rank, in the first steps
    variables = {"FAKE_NPU_SOC": chip, "FAKE_NPU_STATS": str(tmp_path), "FAKE_NPU_OVERFLOW": overflow}
    process = run([PYTHON, *command, *flags], timeout=1200, **variables)
    assert_fine(process)
    assert "Gradient overflow" not in process.stdout  # torch_npu's scaler says so on every rank
    weights = [(tmp_path / "rank{}".format(rank)).read_text() for rank in range(ranks)]
    assert len(set(weights)) == 1, weights
    assert 1 <= int(weights[0].split()[1]) < steps, "{} steps were skipped".format(weights[0].split()[1])
    assert_all_on_the_cards(tmp_path, ranks, steps, most_copies=steps + 5)


@pytest.fixture(scope="module")
def trained_on_eight(few_digits, tmp_path_factory):
    """Weights after some steps on eight cards, in a folder with the log."""
    folder = tmp_path_factory.mktemp("eight")
    flags = [
        "--data",
        few_digits,
        "-b",
        "4",
        "--amp",
        "--lr=0.001",
        "--workers=0",
        "--epochs=2",
        "--output-dir",
        folder,
    ]
    process = run([PYTHON, ROOT / "MnasNet" / "main.py", *flags, *small("MnasNet"), *cards(8)])
    assert_fine(process)
    return folder / "checkpoint.pth.tar"


def evaluation(output):
    """Return the accuracy line of a run's output."""
    return next(line for line in output.splitlines() if line.startswith(" * Acc@1"))


def test_one_and_eight_cards_measure_the_same(trained_on_eight, digits, few_digits):
    data = digits if LONG else few_digits
    flags = ["--data", data, "-b", "32", "--workers=0", "--evaluate", "--resume", trained_on_eight, *small("MnasNet")]
    lines = []
    for ranks in (1, 8):
        process = run([PYTHON, ROOT / "MnasNet" / "main.py", *flags, *cards(ranks)])
        assert_fine(process)
        lines.append(evaluation(process.stdout))
    assert lines[0] == lines[1]


def test_a_checkpoint_of_eight_cards_goes_anywhere(trained_on_eight, few_digits, tmp_path):
    """It loads without torch_npu and without being told where to, and resumes on two cards, on a CPU, without CANN."""
    load = "import sys, torch; torch.load(sys.argv[1], weights_only=True); assert 'torch_npu' not in sys.modules"
    plain = subprocess.run([sys.executable, "-c", load, str(trained_on_eight)], stderr=subprocess.PIPE)
    assert plain.returncode == 0, plain.stderr
    flags = ["--data", few_digits, "-b", "8", "--amp", "--workers=0", "--epochs=3", "--output-dir", tmp_path]
    command = [PYTHON, ROOT / "MnasNet" / "main.py", *flags, *small("MnasNet"), "--resume", trained_on_eight]
    for options, cann in ((cards(2), True), (["--device=cpu"], True), (["--device=cpu"], False)):
        process = run([*command, *options], cann=cann)
        assert_fine(process)
        assert "epoch 2, 0 samples done" in process.stdout
        assert "Epoch: [2]" in process.stdout
