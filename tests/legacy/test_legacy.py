"""The bundles on old versions of torch, against each other and against the newest; run by tests/legacy.sh."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch

from tests.helpers import (
    BUNDLES,
    ROOT,
    assert_refused,
    copy_bundle,
    loss_file,
    result_file,
    run,
    run_script,
    small,
    tiers,
)

OLD = ("1.5", "1.8")  # of torch; tests/legacy.sh makes their environments
PYTHONS = {version: ROOT / ".legacy" / version / "bin" / "python" for version in (*OLD, "2.1")}
PYTHONS["newest"] = sys.executable
STAND_INS = ROOT / "tests" / "legacy" / "stand_ins"
PAIRS = list(itertools.permutations(PYTHONS, 2))  # who saves, who goes on
CIRCLE = [("1.5", "1.8"), ("1.8", "newest"), ("newest", "1.5")]  # every other pair, of three versions
# Of SGD's pairs and AdamW's each one half; all of them in the long form.
RESUMED = [("MnasNet", *pair) for pair in CIRCLE] + [("SPACH-SMLP", *pair[::-1]) for pair in CIRCLE]
RESUMED = tiers(RESUMED, [(bundle, *pair) for bundle in BUNDLES for pair in PAIRS])
# torch 1.8 takes seconds for a step of PNASNet: it computes depthwise convolutions of 96, 216, 432 and 864 channels one
# channel at a time.
ALL = [(bundle, version) for bundle in BUNDLES for version in (*OLD, "2.1")]
SHORT = [(bundle, version) for bundle, version in ALL if version != "2.1"]
TRAINED = tiers([pair for pair in SHORT if pair != ("PnasNet5Large", "1.8")], ALL)
ON_TWO_RANKS = tiers([pair for pair in SHORT if pair[0] != "PnasNet5Large"], ALL)
TRAINING = ["--batch_size=8", "--workers=1", "--learning_rate=0.001"]


@pytest.fixture(autouse=True)
def environment_of_old_torch(request):
    """Skip a test of which a version of torch is not here."""
    values = getattr(request.node, "callspec", None)
    versions = [value for value in values.params.values() if value in PYTHONS] if values else ["1.5"]
    for version in versions or ["1.5"]:
        if version != "newest" and not PYTHONS[version].exists():
            pytest.skip("not run: no torch {} in .legacy: bash tests/legacy.sh".format(version))


def run_legacy(version, bundle, name, *options, **environment):
    process = run_script(bundle, name, *options, timeout=900, PYTHON=PYTHONS[version], **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return process


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """A function that returns a bundle's logits as a version of torch computes them."""
    folder, found = tmp_path_factory.mktemp("logits"), {}

    def compute(version, bundle, size):
        if (version, bundle, size) not in found:
            path = folder / "{}-{}-{}.npy".format(bundle, version, size)
            command = [PYTHONS[version], ROOT / "tests" / "legacy" / "logits.py", bundle, size, path]
            process = run(command, cwd=ROOT, PYTHONPATH=str(ROOT))
            assert process.returncode == 0, process.stderr
            found[version, bundle, size] = np.load(str(path))
        return found[version, bundle, size]

    return compute


@pytest.mark.parametrize("size", tiers([64], [224]))
@pytest.mark.parametrize("version", tiers(OLD, ["2.1"]))
@pytest.mark.parametrize("bundle", BUNDLES)
def test_logits(bundle, version, size, logits):
    size = 331 if (bundle, size) == ("PnasNet5Large", 224) else size
    newest = logits("newest", bundle, size)
    assert np.abs(logits(version, bundle, size) - newest).max() < 1e-5 * np.abs(newest).max()


@pytest.mark.parametrize("bundle, version", TRAINED)
def test_performance(bundle, version, bundle_copy):
    folder = bundle_copy(bundle)
    run_legacy(version, folder, "performance_1p", "--max_steps=2", "--batch_size=2", "--lr=1e-3", *small(bundle))
    perf = result_file(folder, "perf")
    assert {"Network", "Device", "TrainingTime", "ActualLoss", "E2ETrainingTime"} < set(perf)
    assert float(perf["ActualFPS"]) > 0
    assert len(loss_file(folder)) == 2


@pytest.fixture(scope="module")
def trained(few_digits, tmp_path_factory):
    """A function that returns a bundle's folder after an epoch of five steps on two ranks with a version of torch."""
    found = {}

    def train(version, bundle):
        if (version, bundle) not in found:
            folder = copy_bundle(bundle, tmp_path_factory.mktemp("trained"))
            options = ["--data_path={}".format(few_digits), "--rank_size=2", "--epochs=1", *TRAINING, *small(bundle)]
            run_legacy(version, folder, "full_8p", *options, "--output_dir={}".format(folder))
            found[version, bundle] = folder
        return found[version, bundle]

    return train


@pytest.mark.parametrize("bundle, version", ON_TWO_RANKS)
def test_training_on_two_ranks(bundle, version, trained):
    folder = trained(version, bundle)
    perf, acc = result_file(folder, "perf"), result_file(folder, "acc")
    assert (perf["RankSize"], acc["RankSize"]) == ("2", "2") and 0 <= float(acc["TrainAccuracy"]) <= 100
    assert len(loss_file(folder)) == 5
    assert (folder / "checkpoint.pth.tar").is_file() and (folder / "model_best.pth.tar").is_file()


@pytest.mark.parametrize("bundle, saver, reader", RESUMED)
def test_resuming_with_another_version(bundle, saver, reader, trained, few_digits, tmp_path):
    checkpoint = trained(saver, bundle) / "checkpoint.pth.tar"
    folder = copy_bundle(bundle, tmp_path)
    options = ["--data_path={}".format(few_digits), "--epochs=2", *TRAINING, *small(bundle)]
    options += ["--resume={}".format(checkpoint), "--output_dir={}".format(tmp_path)]
    process = run_legacy(reader, folder, "full_1p", *options)
    assert "Epoch: [1]" in process.stdout and "Epoch: [0]" not in process.stdout
    content = torch.load(str(tmp_path / "checkpoint.pth.tar"), weights_only=True)
    assert content["epoch"] == 2
    if bundle == "SPACH-SMLP":  # AdamW counts its steps: five of each version's, ten on one rank
        assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {15}


def on_emulated_npu(bundle, name, calls, *options, version="1.5", **environment):
    """Run a script where torch has NPUs of its own and Ascend's apex is installed; return the process and the calls."""
    environment = dict(environment, PYTHONPATH=str(STAND_INS), APEX_CALLS=str(calls), PYTHON=PYTHONS[version])
    process = run_script(bundle, name, "--max_steps=4", *TRAINING, *options, **environment)
    return process, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.mark.parametrize("bundle, level, bounds, scale", [
    ("MnasNet", "O1", (None, 2.0**24), 2.0**15),
    ("ShuffleNetV2", "O2", (64.0, 64.0), 64.0),  # fixed: it stays
    ("SPACH-SMLP", "O1", (None, 2.0**24), 2.0**15),
])  # fmt: skip
def test_mixed_precision_by_apex(bundle, level, bounds, scale, bundle_copy, few_digits, tmp_path):
    folder = bundle_copy(bundle)
    data = "--data_path={}".format(few_digits)
    flags = ["--epochs=1", *small(bundle)]
    process, calls = on_emulated_npu(
        folder, "full_8p", tmp_path / "1", data, "--rank_size=2", *flags, APEX_OVERFLOW_STEP="3"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    expected = {"opt_level": level, "loss_scale": "dynamic", "combine_grad": True, "ranks": 2}
    expected.update(min_loss_scale=bounds[0], max_loss_scale=bounds[1])
    calls = [call for call in calls if "loaded" not in call]
    assert len(calls) == 2
    for call in calls:
        assert {key: call[key] for key in expected} == expected
    assert "float16 by apex" in process.stdout and '"device": "npu"' in process.stdout
    content = torch.load(str(folder / "checkpoint.pth.tar"), weights_only=True)
    assert content["precision"]["scale"] == scale and content["precision"]["skipped"] == 1
    if bundle == "SPACH-SMLP":
        assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {3}
    process, calls = on_emulated_npu(
        folder, "full_1p", tmp_path / "2", data, "--epochs=1", "--max_steps=10", "--fused-optimizer",
        "--resume={}".format(folder / "checkpoint.pth.tar"), *small(bundle),
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert calls[0]["optimizer"] == ("NpuFusedAdamW" if bundle == "SPACH-SMLP" else "NpuFusedSGD")
    assert calls[1:] == [{"loaded": scale}]


def test_fused_optimizers_need_mixed_precision_MnasNet(bundle_copy, few_digits, tmp_path):
    options = ["--data_path={}".format(few_digits), "--opt-level=O0", "--fused-optimizer", *small("MnasNet")]
    process, calls = on_emulated_npu(bundle_copy("MnasNet"), "full_1p", tmp_path / "calls", *options)
    assert_refused(process, 1, "--fused-optimizer", "--opt-level O1")
    assert calls == []


def test_the_unrelated_apex_is_ignored_with_a_line_MnasNet(bundle_copy, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('pyramid_mailer')")
    options = ["--max_steps=2", "--batch_size=2", *small("MnasNet")]
    process = run_legacy("1.5", bundle_copy("MnasNet"), "performance_1p", *options, PYTHONPATH=str(tmp_path))
    line = "the apex in {} is an unrelated package of that name and is not used".format(tmp_path / "apex")
    assert process.stdout.count(line) == 1 and '"precision": "float32"' in process.stdout
