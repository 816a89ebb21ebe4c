"""What holds for every folder with a main.py, so for a sixth bundle too: layout, order, copies, seed arguments."""

import ast
import re
import shutil

import pytest

from tests.helpers import BUNDLES, ROOT, imported, main_py
from tests.tools import copies

ORDER = [
    "build_parser",
    "build_loaders",
    "build_model",
    "build_optimizer",
    "train_one_epoch",
    "evaluate",
    "main",
]
SEED_ARGUMENTS = {
    "SPNASNet_100": (
        "--data --addr --arch --workers --epoch --batch-size --lr --momentum --weight_decay --amp --loss-scale "
        "--opt-level --multiprocessing-distributed --device-list"
    ),
    "MnasNet": (
        "--device --workers --epochs --batch-size --lr --momentum --weight-decay --multiprocessing-distributed "
        "--device-list"
    ),
    "SPACH-SMLP": "--batch-size --epochs --weight-decay --data-path --world_size --npu --seed --device --resume",
    "PnasNet5Large": "--resume",
    "ShuffleNetV2": (
        "--data --addr --seed --workers --learning-rate --print-freq --eval-freq --arch --dist-backend --batch-size "
        "--epoch --warm_up_epochs --rank --amp --momentum --wd --device-list --benchmark --device_num --dist-url "
        "--multiprocessing-distributed --world-size"
    ),
}
EVERYWHERE = "--loss_scale --max-steps --pretrained --evaluate --output_dir --data_path --image-size"


def test_the_five_bundles_are_there():
    assert set(SEED_ARGUMENTS) <= set(BUNDLES)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_layout_and_reading_order(bundle):
    for name in ("requirements.txt", "README.md", "models/__init__.py", "models/pretrained.py"):
        assert (ROOT / bundle / name).is_file(), name
    text = (ROOT / bundle / "main.py").read_text(encoding="utf-8")
    assert 150 <= len(text.splitlines()) <= 320
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name in ORDER] == ORDER
    for word in ("npu", "cuda", "cpu"):  # common.device decides
        strings = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
        assert [s for s in strings if s == word and bundle != "SPACH-SMLP"] == []


def assert_help_is_readable(text):
    """Assert groups, a word on each option, the defaults, lines that fit a terminal, and the examples at the end."""
    groups = re.findall(r"^([a-z][a-z ]*):$", text, re.MULTILINE)
    assert groups == [
        *("options", "network and recipe", "data", "device and precision", "ranks", "checkpoints", "log"),
        *("after training", "examples"),
    ]
    options = re.split(r"\n  (?=-)", text.partition("\nnetwork")[2].partition("\nexamples:")[0])[1:]
    assert [option for option in options if not re.search(r"(  |\n)\s*\S+", option)] == []
    assert re.search(r"--print-freq N\s[^-]*\(default:\s+10\)", text)
    assert re.search(r"--seed N\s.*\n.*\(default: 0\)", text)
    assert "None" not in text and "False" not in text
    assert max(len(line) for line in text.partition("options:")[2].partition("examples:")[0].splitlines()) <= 80
    assert "    python main.py --data" in text.partition("\nexamples:\n")[2]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_main_has_every_argument_of_its_seed(bundle, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with imported(bundle, "main") as main:
        text = main.build_parser().format_help()
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    for flag in (SEED_ARGUMENTS.get(bundle, "") + " " + EVERYWHERE).split():
        assert flag in words, flag
    assert_help_is_readable(text)


def test_main_prints_its_help_and_refuses_what_it_does_not_know():
    process = main_py("MnasNet", "--help")
    assert process.returncode == 0 and "--batch-size" in process.stdout, process.stderr
    refused = main_py("MnasNet", "--no-such-flag")
    assert refused.returncode == 2 and "--no-such-flag" in refused.stderr


def test_copies_are_marked_and_fresh():
    assert copies.problems() == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_changed_copy_is_found_and_renewed(bundle, tmp_path):
    for name in BUNDLES:
        shutil.copytree(str(ROOT / name), str(tmp_path / name), ignore=shutil.ignore_patterns("output", "*.pth.tar*"))
    path = tmp_path / bundle / "main.py"
    good = path.read_text(encoding="utf-8")
    path.write_text(good.replace("model.eval()", "model.train(False)"), encoding="utf-8")
    assert copies.problems(tmp_path)
    copies.fix(tmp_path)
    assert copies.problems(tmp_path) == []
    if bundle != copies.ORIGINAL:
        assert path.read_text(encoding="utf-8") == good


def test_an_unmarked_twin_is_found(tmp_path):
    for name in BUNDLES:
        shutil.copytree(str(ROOT / name), str(tmp_path / name), ignore=shutil.ignore_patterns("output", "*.pth.tar*"))
    path = tmp_path / "ShuffleNetV2" / "main.py"
    text = path.read_text(encoding="utf-8").replace("# Copied from MnasNet/main.py:evaluate\n", "")
    path.write_text(text, encoding="utf-8")
    assert copies.problems(tmp_path) == ["ShuffleNetV2/main.py:evaluate has a twin in MnasNet/main.py and no marker"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_bundles_never_import_each_other(bundle):
    for path in (ROOT / bundle).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & (set(BUNDLES) | {"tests"})
    for path in (ROOT / "common").rglob("*.py"):
        assert "models" not in path.read_text(encoding="utf-8").split("import ")[1:]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_without_a_word_the_device_is_chosen(bundle):
    with imported(bundle, "main") as main:
        assert main.build_parser().parse_args([]).device == "auto"
