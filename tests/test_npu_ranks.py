"""Several emulated cards over hccl: equal weights, each rank on its own card, checkpoints that go anywhere."""

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
FLAGS = ["-b", "4", "--amp", "--opt-level", "O1", "--loss-scale=1", "--lr=0.001", "--eval-freq=0", "--no-save", "--workers=0"]


@pytest.mark.parametrize("bundle, chip, ranks", JOBS)
def test_weights_stay_equal_when_one_rank_overflows(bundle, chip, ranks, few_digits, tmp_path):
    steps = 10 if LONG or ranks == 8 else 4
    command = [ROOT / "tests" / "rank_weights.py", tmp_path, ROOT / bundle, "--data", few_digits, *FLAGS, *cards(ranks)]
    flags = [*small(bundle), "--epochs=9", "--max-steps={}".format(steps)]
    overflow = "{}:25".format(ranks - 1)  # on the last rank, in the first steps
    variables = {"FAKE_NPU_SOC": chip, "FAKE_NPU_STATS": str(tmp_path), "FAKE_NPU_OVERFLOW": overflow}
    process = run([PYTHON, *command, *flags], timeout=1200, **variables)
    assert_fine(process)
    weights = [(tmp_path / "rank{}".format(rank)).read_text() for rank in range(ranks)]
    assert len(set(weights)) == 1, weights
    assert 1 <= int(weights[0].split()[1]) < steps, "{} steps were skipped".format(weights[0].split()[1])
    assert_all_on_the_cards(tmp_path, ranks, steps)
