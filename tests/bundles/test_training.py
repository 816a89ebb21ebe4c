"""Training, evaluation and fine-tuning of MnasNet on real digits, on one rank, on several, and on two nodes."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from common.transforms import CenterCrop, EncodedImage
from tests.helpers import (
    ROOT,
    assert_refused,
    free_port,
    imported,
    loss_file,
    result_file,
    run,
    run_script,
    small,
    tiers,
)

DIGITS = ["--batch_size=32", "--image-size=48", "--learning_rate=0.02", "--warmup-epochs=1", "--flip=0", "--dropout=0"]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory, quick_python):
    """A copy of MnasNet, trained for a few epochs on the digits."""
    place = tmp_path_factory.mktemp("trained")
    ignored = shutil.ignore_patterns("output", "*.pth.tar*", "__pycache__")
    for name in ("common", "MnasNet"):
        shutil.copytree(str(ROOT / name), str(place / name), ignore=ignored)
    options = ["--data_path={}".format(digits), "--epochs=6", "--arch=mnasnet0_5", "--crop-scale=0.6", *DIGITS]
    process = run_script(place / "MnasNet", "full_1p", *options, PYTHON=quick_python)
    assert process.returncode == 0, process.stdout + process.stderr
    return place / "MnasNet"


def independent_accuracy(checkpoint, data, size):
    """Count the hits of a checkpoint over data/val image by image, with PIL and a model of our own making."""
    content = torch.load(str(checkpoint), weights_only=True)
    with imported("MnasNet") as models:
        model = getattr(models, content["arch"])(len(content["classes"])).eval()
    model.load_state_dict(content["state_dict"])
    crop, mean, std = CenterCrop(size, size * 8 // 7), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    hits1 = hits5 = seen = 0
    for target, name in enumerate(content["classes"]):
        for path in sorted((data / "val" / name).iterdir()):
            out = torch.empty(size, size, 3, dtype=torch.uint8)
            crop(EncodedImage(path.read_bytes()), out)
            image = (out.permute(2, 0, 1) / 255.0 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
            with torch.no_grad():
                best = model(image.unsqueeze(0))[0].topk(5)[1].tolist()
            hits1, hits5, seen = hits1 + (best[0] == target), hits5 + (target in best), seen + 1
    return "{:.3f}".format(100 * hits1 / seen), "{:.3f}".format(100 * hits5 / seen)


def test_it_learns_and_leaves_every_file(trained):
    acc, perf = result_file(trained, "acc"), result_file(trained, "perf")
    assert float(acc["TrainAccuracy"]) > 90  # five seeds: 95.1, deviation 0.5
    assert acc["CaseName"] == "MnasNet_bs32_1p_acc" and perf["CaseName"] == "MnasNet_bs32_1p_perf"
    assert list(acc)[:7] == ["Network", "RankSize", "BatchSize", "DeviceType", "Device", "Data", "CaseName"]
    losses = loss_file(trained)
    assert len(losses) == 6 * 47
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert (trained / "checkpoint.pth.tar").is_file() and (trained / "model_best.pth.tar").is_file()


@pytest.mark.parametrize("ranks", tiers([1, 3], [8]))
def test_one_and_several_ranks_measure_what_an_independent_count_gives(ranks, trained, digits):
    expected = independent_accuracy(trained / "model_best.pth.tar", digits, 48)
    options = ["--data_path={}".format(digits), "--image-size=48", "--workers=1", "--rank_size={}".format(ranks)]
    process = run_script(trained, "eval_1p" if ranks == 1 else "eval_8p", "--arch=mnasnet0_5", *options, timeout=900)
    assert process.returncode == 0, process.stdout + process.stderr
    acc = result_file(trained, "acc", "0_eval")
    assert (acc["TrainAccuracy"], acc["TrainAccuracy5"]) == expected
    assert " * Acc@1 {} Acc@5 {}\n".format(*expected) in process.stdout


def test_fine_tuning_on_fewer_classes(trained, digits, tmp_path, bundle_copy):
    for split in ("train", "val"):
        for name in ("3", "4", "8"):
            shutil.copytree(str(digits / split / name), str(tmp_path / "three" / split / name))
    folder = bundle_copy("MnasNet")
    weights = trained / "model_best.pth.tar"
    options = ["--data_path={}".format(tmp_path / "three"), "--resume={}".format(weights), "--arch=mnasnet0_5"]
    process = run_script(folder, "finetune_1p", "--epochs=8", "--crop-scale=0.6", *options, *DIGITS)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "classifier.1.weight: 10 classes in the file, 3 here: starts fresh" in process.stdout
    assert float(result_file(folder, "acc")["TrainAccuracy"]) > 90  # five seeds: 95.4, deviation 1.4
    content = torch.load(str(folder / "model_best.pth.tar"), weights_only=True)
    assert content["classes"] == ["3", "4", "8"]
    refused = run_script(folder, "eval_1p", "--arch=mnasnet0_5", options[0], "--resume={}".format(weights))
    assert_refused(refused, 1, "the checkpoint has 10 classes, the data set has 3")


def test_another_networks_file_is_refused(trained, few_digits):
    weights = "--resume={}".format(trained / "model_best.pth.tar")
    process = run_script(trained, "finetune_1p", "--data_path={}".format(few_digits), weights, "--arch=mnasnet1_0")
    assert_refused(process, 1, "model_best.pth.tar", "is of another network")


def _checksums(folder):
    return {path.name: path.read_text() for path in folder.glob("rank*")}


@pytest.mark.parametrize("way", tiers(["torchrun"], ["flags"]))
def test_two_nodes_end_with_equal_weights(way, few_digits, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    script = [ROOT / "tests" / "bundles" / "rank_weights.py", out, ROOT / "MnasNet"]
    flags = ["--data", few_digits, "--epochs=1", "--max-steps=2", "-b", "4", "--workers=1", "--device=cpu"]
    flags += ["--output-dir", tmp_path, *small("MnasNet")]
    nodes, port = [], free_port()
    for node in ("0", "1"):
        if way == "flags":
            node_flags = ["--world-size", "2", "--rank", node, "--device-list", "0,1"]
            node_flags += ["--dist-url", "tcp://127.0.0.1:{}".format(port)]
            command = [os.environ["PYTHON"], *script, *flags, "--multiprocessing-distributed", *node_flags]
        else:
            torchrun = [os.environ["PYTHON"], "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", node]
            torchrun += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
            command = [*torchrun, *script, *flags]
        log = open(str(tmp_path / "node{}".format(node)), "w")
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        words = [str(word) for word in command]
        nodes.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment))
    codes = [node.wait(timeout=600) for node in nodes]
    assert codes == [0, 0], (tmp_path / "node0").read_text() + (tmp_path / "node1").read_text()
    checksums = _checksums(out)
    assert sorted(checksums) == ["rank0", "rank1", "rank2", "rank3"][: 4 if way == "flags" else 2]
    assert len(set(checksums.values())) == 1


def test_a_checkpoint_loads_without_this_project(trained):
    code = (
        "import sys, torch; from tests.helpers import images; c = torch.load(sys.argv[1], weights_only=True); "
        "from common.transforms import import_torchvision; m = import_torchvision().models.mnasnet0_5(num_classes=10); "
        "c['state_dict']._metadata = {'': {'version': 2}}; m.load_state_dict(c['state_dict']); "
        "print(m.eval()(images(1, 64).float()).argmax().item())"
    )
    process = run([sys.executable, "-c", code, trained / "model_best.pth.tar"], cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() in [str(digit) for digit in range(10)]


def test_the_images_of_the_sample_set(digits):
    train = sorted((digits / "train").rglob("*.jpg"))
    assert len(train) == 1497 and len(list((digits / "val").rglob("*.jpg"))) == 300
    image = Image.open(str(train[0]))
    assert (image.mode, image.size) == ("RGB", (64, 64))


@pytest.mark.slow  # half a minute of g++
def test_compiled_steps_lose_what_others_lose(few_digits, bundle_copy, tmp_path):
    """Of a network without BatchNorm, which carries rounding to ReLUs that then open or close."""
    place, losses = bundle_copy("SPACH-SMLP"), []
    options = ["--data_path={}".format(few_digits), "--max_steps=8", "--opt-level=O0", "--warmup-epochs=0"]
    options += ["--learning_rate=0.1", *small("SPACH-SMLP")]
    for more in ([], ["--compile"]):
        process = run_script(place, "performance_1p", *options, *more, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        assert process.returncode == 0, process.stdout + process.stderr
        losses.append(loss_file(place))
    assert max(losses[0]) - min(losses[0]) > 0.1 and losses[1] == pytest.approx(losses[0], rel=0, abs=1e-3)
    assert list(tmp_path.rglob("*.so"))
