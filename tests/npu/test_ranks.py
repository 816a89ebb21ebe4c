"""Several emulated cards over hccl: equal weights, each rank on its own card, checkpoints that go anywhere."""

import re
import subprocess
import sys

import pytest

from tests.helpers import BUNDLES, ROOT, tiers
from tests.npu.harness import CHIPS, MOST_CARDS, PYTHON, assert_all_on_the_cards, assert_fine, cards, run, small

# (bundle, chip, ranks): SGD and AdamW; the long form is every bundle on many cards of either chip
SHORT = [("MnasNet", "Ascend910A", 8), ("SPACH-SMLP", "Ascend910B3", 2)]
JOBS = tiers(SHORT, [(bundle, chip, MOST_CARDS[bundle]) for bundle in BUNDLES for chip in CHIPS])
MANY = 4
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


def train_and_check(bundle, chip, ranks, steps, data, folder):
    """Train the bundle in folder `bundle`; the last rank overflows once, and all ranks must end with equal weights."""
    program = ROOT / "tests" / "bundles" / "rank_weights.py"
    command = [PYTHON, program, folder, bundle, "--data", data, *FLAGS, *cards(ranks)]
    flags = [*small(bundle.name), "--epochs=9", "--max-steps={}".format(steps)]
    overflow = "{}:25".format(ranks - 1)  # in the first steps
    variables = {"FAKE_NPU_SOC": chip, "FAKE_NPU_STATS": str(folder), "FAKE_NPU_OVERFLOW": overflow}
    process = run([*command, *flags], timeout=1200, **variables)
    assert_fine(process)
    assert "Gradient overflow" not in process.stdout  # torch_npu's scaler says so on every rank
    assert re.search(r"\tLoss \d", process.stdout)
    assert not re.search(r"\tLoss (nan|inf)", process.stdout)
    assert_all_on_the_cards(folder, ranks, steps, most_copies=steps + 5)
    weights = [(folder / "rank{}".format(rank)).read_text() for rank in range(ranks)]
    assert len(set(weights)) == 1, "the ranks have different weights: {}".format(weights)
    assert 1 <= int(weights[0].split()[1]) < steps, "{} steps were skipped".format(weights[0].split()[1])


@pytest.mark.parametrize("bundle, chip, ranks", JOBS)
def test_weights_stay_equal_when_one_rank_overflows(bundle, chip, ranks, few_digits, tmp_path):
    train_and_check(ROOT / bundle, chip, ranks, 10 if ranks == 8 else 3, few_digits, tmp_path)


# What a mistake in the code would be -> (file, its words, the mistake, chip, what the check above says)
MISTAKES = {
    "the CPU in silence": ("common/device.py", 'return "npu"', 'return "cpu"', CHIPS[1], "computed nothing on a card"),
    "a part on the CPU": (
        "MnasNet/main.py",
        "criterion(logits, targets)",
        "criterion(logits.cpu(), targets.cpu()).to(logits.device)",
        CHIPS[1],
        "copies to the host",
    ),
    "labels on another card": (
        "common/data.py",
        "pixels, targets = receive()",
        'pixels, targets = (copy.to("npu:7") for copy in receive())',
        CHIPS[1],
        "Expected all tensors to be on the same device",
    ),
    "every rank on card 0": (
        "common/device.py",
        "distributed.card_ids(args)[self.ranks.local_rank])",
        "0)",
        CHIPS[1],
        "both run on card 0",
    ),
    "a float64 sum over hccl": (
        "common/distributed.py",
        "dist.all_reduce(tensor)",
        "dist.all_reduce(tensor.cpu().double().to(tensor.device))",
        CHIPS[1],
        "Unsupported data type at::kDouble",
    ),
    "a scaler that tells no other rank": (
        "common/precision.py",
        "if sees_infinity and",
        "if",
        CHIPS[0],
        "the ranks have different weights",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_still_applies(mistake):
    file, words, *_ = MISTAKES[mistake]
    assert (ROOT / file).read_text().count(words) == 1


@pytest.mark.slow  # of the tests, not of the code
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, bundle_copy, few_digits, tmp_path):
    file, words, wrong_words, chip, finding = MISTAKES[mistake]
    bundle = bundle_copy("MnasNet")
    path = bundle.parent / file
    path.write_text(path.read_text().replace(words, wrong_words))
    with pytest.raises(AssertionError, match=finding):
        train_and_check(bundle, chip, 2, 6, few_digits, tmp_path)


@pytest.fixture(scope="module")
def trained_on_many(few_digits, tmp_path_factory):
    """A checkpoint of two epochs on many cards, and one of its best weights."""
    folder = tmp_path_factory.mktemp("many")
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
    process = run([PYTHON, ROOT / "MnasNet" / "main.py", *flags, *small("MnasNet"), *cards(MANY)])
    assert_fine(process)
    return folder / "checkpoint.pth.tar"


def evaluation(output):
    """Return the accuracy line of a run's output."""
    return next(line for line in output.splitlines() if line.startswith(" * Acc@1"))


def test_one_and_many_cards_measure_the_same(trained_on_many, few_digits):
    flags = [
        "--data",
        few_digits,
        "-b",
        "32",
        "--workers=0",
        "--evaluate",
        "--resume",
        trained_on_many,
        *small("MnasNet"),
    ]
    lines = []
    for ranks in (1, MANY):
        process = run([PYTHON, ROOT / "MnasNet" / "main.py", *flags, *cards(ranks)])
        assert_fine(process)
        lines.append(evaluation(process.stdout))
    assert lines[0] == lines[1]


def test_a_checkpoint_of_many_cards_goes_anywhere(trained_on_many, few_digits, tmp_path):
    """It loads without torch_npu and without being told where to, and resumes on two cards, on a CPU, without CANN."""
    load = "import sys, torch; torch.load(sys.argv[1], weights_only=True); assert 'torch_npu' not in sys.modules"
    plain = subprocess.run([sys.executable, "-c", load, str(trained_on_many)], stderr=subprocess.PIPE)
    assert plain.returncode == 0, plain.stderr
    flags = ["--data", few_digits, "-b", "8", "--amp", "--workers=0", "--epochs=3", "--output-dir", tmp_path]
    command = [PYTHON, ROOT / "MnasNet" / "main.py", *flags, *small("MnasNet"), "--resume", trained_on_many]
    for options, cann in ((cards(2), True), (["--device=cpu"], True), (["--device=cpu"], False)):
        process = run([*command, *options], cann=cann)
        assert_fine(process)
        assert "epoch 2, 0 samples done" in process.stdout
        assert "Epoch: [2]" in process.stdout
