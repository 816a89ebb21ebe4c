"""The 40 scripts as a user types them: their form, what they refuse, and what a run leaves behind."""

import stat
import subprocess
import sys

import pytest

from tests.bundles import BUNDLES, ROOT
from tests.conftest import loss_file, result_file, run, run_script

MODES = ("eval", "finetune", "full", "performance")
SMALL = {  # two images on a last map of 1x1 would leave BatchNorm two numbers, and gradients beyond all bounds
    "MnasNet": ["--arch", "mnasnet0_5", "--image-size", "64"],
    "SPNASNet_100": ["--image-size", "64"],
    "SPACH-SMLP": ["--image-size", "32"],
    "PnasNet5Large": ["--image-size", "64", "--aux-weight", "0"],
    "ShuffleNetV2": ["--arch", "shufflenet_v2_x0_5", "--image-size", "32"],
}
PERF_KEYS = [
    *("Network", "RankSize", "BatchSize", "DeviceType", "Device", "Data", "CaseName"),
    *("ActualFPS", "TrainingTime", "ActualLoss", "E2ETrainingTime"),
]


def small(bundle):
    """Return flags that make a bundle's network and images small enough for a test; any new bundle needs some."""
    return SMALL[bundle]


def assert_refused(process, status, *words):
    """Assert one clear line with `words`, the exit status, and nothing that looks like a result or a crash."""
    assert process.returncode == status, process.stdout + process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("[Error]")]
    errors += [line for line in process.stdout.splitlines() if line.startswith("[Error]") and line not in errors]
    assert len(errors) == 1, process.stdout + process.stderr
    for word in words:
        assert word in errors[0]
    assert "Final" not in process.stdout
    assert "Traceback" not in process.stdout + process.stderr


@pytest.mark.parametrize("bundle", BUNDLES)
def test_each_bundle_has_eight_scripts_of_recipe_alone(bundle):
    names = sorted(path.name for path in (ROOT / bundle / "test").glob("*.sh"))
    assert names == sorted("train_{}_{}p.sh".format(mode, n) for mode in MODES for n in (1, 8))
    for name in names:
        path = ROOT / bundle / "test" / name
        lines = path.read_text().splitlines()
        assert len(lines) <= 15
        assert path.stat().st_mode & stat.S_IXUSR
        commands = [line for line in lines if not line.startswith("#")]
        assert commands[0] == 'exec bash "$(dirname "$0")/../../common/launch.sh" "$0" "$@" -- \\'
        assert all(line.startswith("    --") for line in commands[1:])


@pytest.mark.parametrize("bundle", BUNDLES)
def test_main_accepts_every_recipe(bundle, tmp_path):
    (tmp_path / "weights").write_bytes(b"")
    (tmp_path / "python").write_text("#!/bin/sh\n")  # importing torch forty times would take minutes
    (tmp_path / "python").chmod(0o755)
    commands = []
    for mode in MODES:
        for n in (1, 8):
            options = ["--dry-run", "--data_path={}".format(tmp_path)]
            options += ["--resume={}".format(tmp_path / "weights")] if mode in ("eval", "finetune") else []
            process = run_script(ROOT / bundle, "{}_{}p".format(mode, n), *options, PYTHON=tmp_path / "python")
            assert process.returncode == 0, process.stderr
            words = process.stdout.splitlines()[1].split()
            commands.append(words[words.index(str(ROOT / bundle / "main.py")) + 1 :])
    check = "import main; print(*(main.parse_args(c.split()).arch for c in {!r}))".format(
        [" ".join(command) for command in commands]
    )
    process = run([sys.executable, "-c", check], cwd=ROOT / bundle)
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.split()) == 8


@pytest.mark.parametrize("bundle", BUNDLES)
def test_performance_needs_nothing_and_leaves_every_key(bundle, bundle_copy):
    folder = bundle_copy(bundle)
    process = run_script(folder, "performance_1p", "--max_steps=12", "--batch_size=2", *small(bundle))
    assert process.returncode == 0, process.stdout + process.stderr
    perf = result_file(folder, "perf")
    assert list(perf) == PERF_KEYS
    assert perf["Network"] == bundle
    assert (perf["RankSize"], perf["BatchSize"], perf["Data"]) == ("1", "2", "synthetic")
    assert float(perf["ActualFPS"]) > 0
    assert "Final Performance images/sec : {}\n".format(perf["ActualFPS"]) in process.stdout
    assert len(loss_file(folder)) == 12
    assert not list(folder.glob("*.pth.tar*"))


def test_unknown_option_is_refused_before_anything_happens(bundle_copy):
    folder = bundle_copy("MnasNet")
    (folder / "test" / "output" / "0").mkdir(parents=True)
    process = run_script(folder, "performance_1p", "--batchsize=3")
    assert_refused(process, 2, "--batchsize", "--batch_size=", "--label-smoothing")
    assert [path.name for path in (folder / "test" / "output").iterdir()] == ["0"]


def test_help_has_groups_defaults_the_recipe_and_an_example(bundle_copy):
    process = run_script(bundle_copy("MnasNet"), "full_8p", "--help")
    assert process.returncode == 0
    for word in (
        *("300 epochs", "14413.78", "\ndata and cards:\n", "\nrecipe:\n", "\ncheckpoints:\n", "\nexample:\n  bash "),
        *("--data_path=DIR", "--rank_size=N         number of cards (default: 8)", "per card (default: 512)"),
        *("--epochs=N            default: 300", "--learning_rate=X     default: 1.4", " --label-smoothing"),
    ):
        assert word in process.stdout
    assert "--compare" not in process.stdout  # that of the results tool is no flag of main.py


def test_dry_run_prints_command_environment_and_recipe_and_makes_nothing(bundle_copy, tmp_path):
    folder = bundle_copy("MnasNet")
    (tmp_path / "cann").mkdir()  # an Ascend host, where npu_env.sh has something to set
    process = run_script(
        folder, "performance_8p", "--dry-run", "--batch_size=3", "--lr", "0.5", "--device=cpu",
        ASCEND_HOME_PATH=tmp_path / "cann", ASCEND_OPP_PATH=tmp_path / "cann", HCCL_CONNECT_TIMEOUT="7",
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == "command:"
    assert "/main.py --arch mnasnet1_0 --epochs 6 " in lines[1] and "--batch-size 3" in lines[1]
    assert lines[2] == "environment:"
    environment = lines[3 : lines.index("recipe on this machine:")]
    assert "  TASK_QUEUE_ENABLE=2" in environment
    assert not any("HCCL_CONNECT_TIMEOUT" in line for line in environment)  # the user's own stays
    recipe = lines[lines.index("network and recipe:") :]
    for line in ("  --arch mnasnet1_0", "  --batch-size 3  (default: 256)", "  --learning-rate 0.5  (default: 0.1)"):
        assert line in recipe
    assert "  --device-list 0,1,2,3,4,5,6,7" in recipe
    assert not (folder / "test" / "output").exists()


def _break_data(kind, folder):
    for split in ("train", "val"):
        (folder / split / "cat").mkdir(parents=True)
    if kind == "missing":
        return folder / "nothing"
    if kind == "without val":
        (folder / "val" / "cat").rmdir()
        (folder / "val").rmdir()
    if kind == "unknown class":
        for name in ("train/cat/1.png", "train/cat/2.png", "train/cat/3.png", "train/cat/4.png", "val/dog\n/1.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", ["nothing is not a folder"]),
        ("empty", ["has no images"]),
        ("without val", ["has no val/ folder"]),
        ("unknown class", ["train/ does not know", "dog?"]),
    ],
)
@pytest.mark.parametrize("script", ["full_1p", "full_8p"])
def test_a_broken_data_set_is_one_line(kind, words, script, bundle_copy, tmp_path):
    data = _break_data(kind, tmp_path / "data")
    folder = bundle_copy("MnasNet")
    process = run_script(folder, script, "--data_path={}".format(data), "--rank_size=2", *small("MnasNet"))
    assert_refused(process, 1, *words)


def test_what_the_modes_need(bundle_copy, few_digits):
    folder = bundle_copy("MnasNet")
    assert_refused(run_script(folder, "full_1p"), 1, 'para "data_path" must be config')
    assert_refused(run_script(folder, "eval_1p", "--data_path={}".format(few_digits)), 1, "no model_best.pth.tar")
    assert_refused(run_script(folder, "finetune_8p", "--data_path=x", "--resume=y"), 1, "there is no file y")
    assert_refused(run_script(folder, "full_1p", "--data_path=x", "--rank_size=0"), 2, "--rank_size=0")
    assert not (folder / "test" / "output").exists()


def test_an_output_folder_that_cannot_be_written(bundle_copy):
    folder = bundle_copy("MnasNet")
    (folder / "test" / "output").write_text("in the way")
    assert_refused(run_script(folder, "performance_1p"), 1, "test/output cannot be written")
    assert (folder / "test" / "output").read_text() == "in the way"


def test_a_checkpoint_folder_that_cannot_be_written(bundle_copy, few_digits, tmp_path):
    (tmp_path / "file").write_text("in the way")
    options = ["--data_path={}".format(few_digits), "--output_dir={}".format(tmp_path / "file")]
    process = run_script(bundle_copy("MnasNet"), "full_1p", *options, *small("MnasNet"))
    assert_refused(process, 1, str(tmp_path / "file"))


def test_the_exit_status_is_the_trainings(bundle_copy):
    folder = bundle_copy("MnasNet")
    (folder / "main.py").write_text((folder / "main.py").read_text().replace("args = parse_args(argv)", "sys.exit(37)"))
    process = run_script(folder, "performance_1p")
    assert process.returncode == 37
    assert "ended with status 37" in process.stderr
    assert "Final" not in process.stdout


def test_a_device_that_is_not_there(bundle_copy):
    process = run_script(bundle_copy("MnasNet"), "performance_1p", "--device=npu")
    assert_refused(process, 1, "--device npu")


def test_two_runs_give_the_same_losses_and_the_first_is_kept(bundle_copy, few_digits):
    folder = bundle_copy("MnasNet")
    losses = []
    for _ in range(2):
        process = run_script(
            folder, "full_1p", "--data_path", few_digits, "--max_steps=6", "--batch_size=8", *small("MnasNet")
        )
        assert process.returncode == 0, process.stdout + process.stderr
        losses.append(loss_file(folder))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    output = folder / "test" / "output"
    (previous,) = output.glob("0.prev-*")
    for run_folder in (output / "0", previous):
        names = sorted(path.name for path in run_folder.iterdir())
        case = "MnasNet_bs8_1p"
        assert set(names) >= {case + "_acc.log", case + "_perf.log", "nohup.out", "train_0.log", "metrics.jsonl"}
        assert "train_{}_acc_loss.txt".format(case) in names
    assert (folder / "checkpoint.pth.tar").is_file() and (folder / "model_best.pth.tar").is_file()
    assert len(list(folder.glob("model_best.pth.tar.prev-*"))) == 1


def test_the_device_id_names_the_folder(bundle_copy):
    folder = bundle_copy("MnasNet")
    options = ["--max_steps=2", "--batch_size=2", *small("MnasNet")]
    assert run_script(folder, "performance_1p", "--device_id=3", *options).returncode == 0
    assert run_script(folder, "performance_1p", *options, ASCEND_DEVICE_ID="5").returncode == 0
    assert (folder / "test" / "output" / "3" / "train_3.log").is_file()
    assert (folder / "test" / "output" / "5" / "train_5.log").is_file()


def test_bash_can_read_all_scripts():
    scripts = sorted(ROOT.glob("*/test/*.sh")) + sorted((ROOT / "common").glob("*.sh"))
    assert len(scripts) == 8 * len(BUNDLES) + 2
    for script in scripts:
        assert subprocess.call(["bash", "-n", str(script)]) == 0


def test_the_newest_best_checkpoint_is_the_default(bundle_copy, few_digits):
    folder = bundle_copy("PnasNet5Large")  # it keeps its checkpoints in the output folder
    output = folder / "test" / "output"
    for name in ("0.prev-20250101-000000", "0.prev-20260101-000000", "0"):
        (output / name).mkdir(parents=True)
        (output / name / "model_best.pth.tar").write_bytes(b"")
        process = run_script(folder, "eval_1p", "--data_path={}".format(few_digits), "--dry-run")
        assert "/output/{}/model_best.pth.tar".format(name) in process.stdout


@pytest.mark.parametrize("package", ["torch", "numpy", "timm"])
def test_a_package_that_is_not_installed_is_one_line(package, tmp_path):
    """Of the program itself, which may be started without a script."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ModuleNotFoundError(name={!r})".format(package + ".part"))
    (tmp_path / package / "version.py").write_text("")
    process = run([sys.executable, ROOT / "SPACH-SMLP" / "main.py", "--help"], PYTHONPATH=str(tmp_path))
    assert_refused(process, 1, package + " is missing for " + sys.executable, "SPACH-SMLP/requirements.txt")
