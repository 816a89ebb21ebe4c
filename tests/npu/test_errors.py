"""What users of NPUs meet is one clear line with the cure, exit status 1, no traceback. What the fake card refuses."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT, small
from tests.npu.harness import CANN, PYTHON, cards, run

NPU = ["--device=npu"]


def main(few_digits, *flags, **kwargs):
    """Run a few steps of MnasNet, and return the finished process."""
    common = ["--data", few_digits, "-b", "8", "--max-steps=4", "--workers=0", "--no-save", "--eval-freq=0"]
    return run([PYTHON, ROOT / "MnasNet" / "main.py", *common, *small("MnasNet"), *flags], **kwargs)


def assert_one_line(process, *words):
    """Check the one error; ranks that meet it while another one ends may say it too."""
    assert process.returncode == 1, process.stdout
    lines = [line for line in process.stdout.splitlines() if line.startswith("[Error]")]
    (line,) = {re.sub("rank [0-9]+: ", "", line) for line in lines}
    assert "traceback" not in process.stdout.lower()
    for word in words:
        assert word in line


REAL = {"PYTHON": str(PYTHON)}  # one that imports torch_npu where there is no card
FAULTS = {
    "no card": (NPU, {"FAKE_NPU_COUNT": "0", **REAL}, ["sees no card", "npu-smi"]),
    "hidden cards": (NPU, {"ASCEND_RT_VISIBLE_DEVICES": ""}, ["sees no card", "ASCEND_RT_VISIBLE_DEVICES="]),
    "cards in falling order": (
        NPU,
        {"ASCEND_RT_VISIBLE_DEVICES": "5,3"},
        ["in rising order: ASCEND_RT_VISIBLE_DEVICES=5,3"],
    ),
    "renumbered": (
        [*NPU, "--device-list=3"],
        {"ASCEND_RT_VISIBLE_DEVICES": "3,4"},
        ["has 2 (0 to 1)", "numbers those"],
    ),
    "more ranks than cards": (cards(2), {"FAKE_NPU_COUNT": "1"}, ["card 1", "has 1 (0 to 0)"]),
    "card cannot be opened": (NPU, {"FAKE_NPU_MISSING": "0", **REAL}, ["is the card healthy (npu-smi info)"]),
    "memory": (NPU, {"FAKE_NPU_MEMORY_MIB": "12"}, ["out of memory", "a smaller --batch-size (--lr in proportion)"]),
    "hccl timeout": (
        cards(2),
        {"FAKE_NPU_HCCL_HANG": "1:7", "HCCL_EXEC_TIMEOUT": "3"},
        ["a rank waited for the others", "HCCL_EXEC_TIMEOUT"],
    ),
    "no bfloat16": (
        [*NPU, "--amp", "--amp-dtype=bfloat16"],
        {"FAKE_NPU_SOC": "Ascend910A"},
        ["Ascend910A has none", "use float16"],
    ),
    "gloo for cards": ([*cards(2), "--dist-backend=gloo"], {}, ["npu -- leave --dist-backend out: NPUs take hccl"]),
    "formats on a CPU": (["--device=cpu", "--internal-format=on"], {}, ["are the NPU's; this device is cpu"]),
    "graphs and a queue": ([*NPU, "--compile"], {"TASK_QUEUE_ENABLE": "2"}, ["export TASK_QUEUE_ENABLE=1"]),
    "CANN is gone": (NPU, {"ASCEND_HOME_PATH": "/nowhere", **REAL}, ["/nowhere", "set_env.sh"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(fault, few_digits):
    flags, variables, words = FAULTS[fault]
    assert_one_line(main(few_digits, *flags, **variables), *words)


def test_a_cpu_that_takes_the_place_of_hidden_cards_is_no_secret(few_digits):
    process = main(few_digits, ASCEND_RT_VISIBLE_DEVICES="5,3", **REAL)
    assert process.returncode == 0
    assert "[Warning] torch_npu sees no card (" in process.stdout and "5,3): this is a CPU" in process.stdout


@pytest.mark.parametrize("flags", [["--device=npu"], []])
def test_cann_that_is_not_sourced(flags, few_digits):
    """Also without --device: who has installed torch_npu does not want to train on the CPU by mistake."""
    words = ["finds no CANN", "libhccl.so", "set_env.sh"] + ([] if flags else ["--device cpu trains without it"])
    assert_one_line(main(few_digits, *flags, cann=False), *words)


def test_a_library_of_cann_that_is_missing_is_one_line(few_digits, tmp_path):
    """Not the first that torch_npu is linked to: to look for that one alone is not enough."""
    for library in (CANN / "lib64").iterdir():
        if library.name != "libge_runner.so":
            (tmp_path / library.name).symlink_to(library)
    process = main(few_digits, *NPU, LD_LIBRARY_PATH=str(tmp_path), **REAL)
    assert_one_line(process, "finds no CANN (libge_runner.so", "set_env.sh")


def test_a_missing_driver_is_not_called_a_missing_cann(few_digits, tmp_path):
    """As in a container to which nobody has passed the driver: CANN's own libraries want one of it."""
    for library in (CANN / "lib64").iterdir():
        if library.name not in ("libascend_hal.so", "libgraph.so"):
            (tmp_path / library.name).symlink_to(library)
    for name, options in (("ascend_hal", []), ("graph", ["-L", tmp_path, "-Wl,--no-as-needed", "-lascend_hal"])):
        target = tmp_path / "lib{}.so".format(name)
        subprocess.run(["gcc", "-shared", "-o", target, "-x", "c", "/dev/null", "-x", "none", *options], check=True)
    (tmp_path / "libascend_hal.so").unlink()
    process = main(few_digits, *NPU, LD_LIBRARY_PATH=str(tmp_path), **REAL)
    assert_one_line(process, "finds no driver (libascend_hal.so", "container", "LD_LIBRARY_PATH")


@pytest.mark.parametrize(
    "npu_version, cuda, words",
    [
        ("2.9.0", "None", ["torch_npu 2.9.0 does not fit torch 2.13.0", "torch_npu==2.13.0.*"]),
        ("2.13.0", "'13.0'", ["built for CUDA 13.0", "pip install torch==2.13.0 --index-url"]),
        ("2.13.0", "None", ["finds no CANN"]),
    ],
)
def test_what_would_break_the_import_of_torch_is_found_before(npu_version, cuda, words, tmp_path):
    """Packages of the names that end the process when they are imported."""
    versions = {"torch": "2.13.0+cu130", "torch_npu": npu_version}
    for name, version in versions.items():
        (tmp_path / name).mkdir()
        text = "__version__ = '{}'\ncuda: Optional[str] = {}\n".format(version, cuda if name == "torch" else "None")
        (tmp_path / name / "version.py").write_text(text)
        (tmp_path / name / "__init__.py").write_text("def _autoload(): pass\nimport os\nos.abort()\n")
    code = "import common, os; print(common.NPU_PROBLEM, os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD'))"
    variables = dict(os.environ, PYTHONPATH="{}:{}".format(tmp_path, ROOT))
    output = subprocess.run(
        [sys.executable, "-c", code], env=variables, check=True, stdout=subprocess.PIPE
    ).stdout.decode()
    assert output.strip().endswith(" 0")
    for word in words:
        assert word in output


REFUSED = {
    "torch.ones(2).npu() + torch.ones(2)": "Expected all tensors to be on the same device, but got other is on cpu",
    "torch.ones(2).npu() + torch.ones(2).to('npu:1')": "got other is on npu:1",
    "torch.ones(2, dtype=torch.float64).npu() + 1": "float64, which no card computes",
    "torch.ones(2, 3, 4, 4).npu().to(memory_format=torch.channels_last)": "Only contiguous_format",
    "torch.ones(2, 3, 4, 4).npu().contiguous(memory_format=torch.channels_last)": "only supported contiguous",
    "torch.linalg.eigvalsh(torch.eye(3).npu())": "FALLBACK_CPU",  # no kernel: falling back to the CPU is an error
    "torch_npu.npu_rotary_mul(*[torch.ones(1, 1, 1, 64).npu()] * 3)": "otary",  # a kernel that the fake does not have
}
TRY = """
import json, sys, torch, torch_npu
results = []
for code in json.loads(sys.argv[1]):
    try:
        results.append("result: {}".format(eval(code)))
    except RuntimeError as error:
        results.append(str(error))
print("results", json.dumps(results))
"""


def test_the_fake_card_refuses():
    process = run([PYTHON, "-c", TRY, json.dumps(list(REFUSED))])
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("results ")]
    for code, answer in zip(REFUSED, json.loads(line[len("results ") :])):
        assert REFUSED[code] in answer, "{} gave {}".format(code, answer)


def test_the_first_generation_has_no_bfloat16():
    code = "import torch\nprint('result:', torch.ones(2, dtype=torch.bfloat16).npu() + 1)"
    process = run([PYTHON, "-c", code], FAKE_NPU_SOC="Ascend910A")
    assert process.returncode != 0 and "bfloat16, which the first generation does not have" in process.stdout


RANKS = """
import sys
import torch
import torch.distributed as dist
store, rank, card = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.npu.set_device(card)
dist.init_process_group("hccl", init_method="file://" + store, rank=rank, world_size=2)
for dtype in (torch.float32, torch.float64):
    dist.all_reduce(torch.ones(3, dtype=dtype).npu())
    sys.stdout.write("result {} of rank {}\\n".format(dtype, rank))
"""


@pytest.mark.parametrize(
    "card, words, results", [(1, "Unsupported data type at::kDouble", 2), (0, "both run on card 0", 0)]
)
def test_what_hccl_refuses(card, words, results, tmp_path):
    """float64, which float32 is there to compare with; and two ranks on one card."""
    both = 'for i in 0 1; do "$0" -c "$1" "$2" $i $((i * $3)) & done; wait'
    process = run(["bash", "-c", both, PYTHON, RANKS, tmp_path / "store", card])
    assert words in process.stdout
    assert process.stdout.count("result torch.float32") == results, process.stdout
    assert "result torch.float64" not in process.stdout
