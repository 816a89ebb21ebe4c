"""The 40 scripts as a user types them: their form, what they refuse, and what a run leaves behind."""

import fcntl
import json
import os
import pathlib
import socket
import stat
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor

import pytest

from common import distributed
from tests.helpers import (
    BUNDLES,
    ROOT,
    assert_refused,
    copy_bundle,
    imported,
    loss_file,
    result_file,
    run,
    run_script,
    small,
)

MODES = ("eval", "finetune", "full", "performance")
PERF_KEYS = [
    *("Network", "RankSize", "BatchSize", "DeviceType", "Device", "Data", "CaseName"),
    *("ActualFPS", "TrainingTime", "ActualLoss", "E2ETrainingTime"),
]


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
    (tmp_path / "python").write_text("#!/bin/sh\n")  # importing torch forty times would take minutes
    (tmp_path / "python").chmod(0o755)
    commands = []
    for mode in MODES:
        for n in (1, 8):
            options = ["--dry-run", "--data_path={}".format(tmp_path)]
            process = run_script(ROOT / bundle, "{}_{}p".format(mode, n), *options, PYTHON=tmp_path / "python")
            assert process.returncode == 0, process.stderr
            words = process.stdout.splitlines()[1].split()
            commands.append(words[words.index(str(ROOT / bundle / "main.py")) + 1 :])
    with imported(bundle, "main") as main:
        parser = main.build_parser()
    for command in commands:
        args = parser.parse_args(command)
        chosen = {"--arch", "--image-size", "--zero-pad", "--channel-shuffle", "--eval-ema"} & set(command)
        assert chosen == (set() if args.evaluate or args.pretrained else {"--arch"})  # else the checkpoint says it


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


WRONG = {  # what a user may type after a script, and what the line says
    "--batchsize=3": (2, "--batchsize"),
    "--batch_size=8.5": (2, "--batch-size", "8.5"),
    "--device=tpu": (2, "--device", "tpu"),
    "--device=npu": (1, "--device npu"),
    "--epochs=": (2, "--epochs"),
    "--max_steps=-1": (2, "--max-steps", "-1"),
    "--output_dir=": (2, "--output-dir"),
    "--data_path=": (2, "--data_path", "is a variable unset?"),
    "--resume=": (2, "--resume", "is a variable unset?"),
    "--resume=nothing": (1, "--resume", "there is no file nothing"),
    "--rank_size=0": (2, "--rank_size=0"),
    "--device_id=x": (2, "--device_id=x"),
    "--max_steps": (2, "--max_steps needs a value"),
    "wrod": (2, "unrecognized arguments: wrod", "--help lists all options"),
}


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A copy of MnasNet with the output of a run."""
    folder = copy_bundle("MnasNet", tmp_path_factory.mktemp("used") / "a place")
    (folder / "test" / "output" / "0").mkdir(parents=True)
    (folder / "test" / "output" / "0" / "train_0.log").write_text("Epoch: [0][ 1/2]")
    return folder


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_is_refused_once_and_before_anything_happens(option, used):
    status, *words = WRONG[option]
    before = sorted(used.rglob("*"))
    assert_refused(run_script(used, "performance_1p", option, PYTHONDONTWRITEBYTECODE="1"), status, *words)
    assert sorted(used.rglob("*")) == before


def test_help_has_all_options_and_the_recipe_and_needs_no_python(bundle_copy):
    process = run_script(bundle_copy("MnasNet"), "full_8p", "--epochs=2", "--help", PYTHON="no-python")
    assert process.returncode == 0
    for word in (
        *("300 epochs", "14413.78", "main.py --help", "--rank_size=N         number of cards (default: 8)"),
        *("--data_path=DIR", "--device=npu|gpu|cpu", "--device_id=N", "--batch_size=N", "--epochs=N"),
        *("--learning_rate=X", "--workers=N", "--resume=FILE", "--max_steps=N", "--output_dir=DIR", "--dry-run"),
        *("\nflags of the recipe: --arch mnasnet1_0 --epochs 300 --batch-size 512 ", "--lr 1.4 "),
    ):
        assert word in process.stdout


@pytest.mark.parametrize("bundle", BUNDLES)
def test_help_leaves_to_main_py_which_batch_the_learning_rate_is_for(bundle):
    """SPACH-SMLP's is for 512 images, and scaled to those of all cards; the others' is not scaled."""
    text = run_script(ROOT / bundle, "full_8p", "--help").stdout
    assert "--learning_rate=X" in text and "--lr of main.py" in text and "batch of all cards" not in text


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
    recipe = lines[lines.index("recipe on this machine:") :]
    for line in ("  --arch mnasnet1_0", "  --batch-size 3  (default: 256)", "  --lr 0.5  (default: 0.1)"):
        assert line in recipe
    assert "  --device-list 0,1,2,3,4,5,6,7" in recipe
    assert not (folder / "test" / "output").exists()


@pytest.mark.parametrize("mode", ["eval", "full"])
def test_dry_run_needs_neither_the_device_nor_a_checkpoint_nor_the_data(mode, bundle_copy):
    options = ["--dry-run", "--device=npu", "--data_path=/not/here"]
    process = run_script(bundle_copy("MnasNet"), mode + "_8p", *options)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "  --device npu  (default: auto)" in process.stdout.splitlines()


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
        ("missing", ["there is no folder", "nothing"]),
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
    if kind in ("missing", "without val"):  # to be seen without reading every folder
        assert not (folder / "test" / "output").exists()


def test_what_the_modes_need(bundle_copy, few_digits):
    folder = bundle_copy("MnasNet")
    assert_refused(run_script(folder, "full_1p"), 1, 'para "data_path" must be config')
    assert_refused(run_script(folder, "eval_1p", "--data_path={}".format(few_digits)), 1, "no model_best.pth.tar")
    assert_refused(run_script(folder, "finetune_8p", "--data_path=x", "--resume=y"), 1, "there is no file y")
    assert not (folder / "test" / "output").exists()


def test_an_output_folder_that_cannot_be_written(bundle_copy):
    folder = bundle_copy("MnasNet")
    (folder / "test" / "output").write_text("in the way")
    assert_refused(run_script(folder, "performance_1p"), 1, "test/output cannot be written")
    assert (folder / "test" / "output").read_text() == "in the way"


def test_a_folder_that_another_run_writes_to_is_left_alone(bundle_copy):
    folder = bundle_copy("MnasNet")
    output = folder / "test" / "output" / "0"
    output.mkdir(parents=True)
    with open(str(output / "nohup.out"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = run_script(folder, "performance_1p", *small("MnasNet"))
    assert_refused(process, 1, "another run writes to {}: give this one another --device_id".format(output))
    assert os.listdir(str(output.parent)) == ["0"]


@pytest.mark.parametrize(
    "options, steps",
    [
        (["--epochs=10", "--device=gpu"], "--max-steps 0"),  # whole epochs, on a card as on a CPU
        (["--epochs=10", "--device=cpu"], "--max-steps 0"),
        (["--epochs=10", "--max_step=7", "--device=cpu"], "--max-steps 7"),  # as ModelZoo's programs call it
        (["--device=gpu"], "--max-steps 1000"),
    ],
)
def test_epochs_of_the_user_are_not_cut_by_the_steps_of_the_recipe(options, steps, bundle_copy):
    words = ["--data_path=x", "--resume=x.pth", "--dry-run", *options]
    process = run_script(bundle_copy("PnasNet5Large"), "finetune_1p", *words)
    assert process.returncode == 0, process.stderr
    assert any(line.split("  (")[0].strip() == steps for line in process.stdout.splitlines()), process.stdout


def test_variables_of_the_user_do_not_steer_a_script(bundle_copy, few_digits):
    folder = bundle_copy("MnasNet")
    exported = {"resume": "x.pth", "epochs": "3", "max_steps": "1", "previous": "/", "queue": "7", "CDPATH": "/tmp:/"}
    exported["data"] = "/"
    process = run_script(folder, "full_1p", "--data_path={}".format(few_digits), "--dry-run", **exported)
    plain = run_script(folder, "full_1p", "--data_path={}".format(few_digits), "--dry-run")
    assert process.returncode == 0 and process.stderr == "" and process.stdout == plain.stdout


def test_an_8p_script_within_torchrun_is_one_line(bundle_copy):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert_refused(run_script(bundle_copy("MnasNet"), "performance_8p", **ranks), 2, "RANK, LOCAL_RANK and WORLD_SIZE")


def test_results_stand_beside_the_log_where_the_user_puts_it(bundle_copy, tmp_path):
    options = ["--log-dir", tmp_path / "log", "--max_steps=4", *small("MnasNet")]
    process = run_script(bundle_copy("MnasNet"), "performance_1p", *options)
    assert process.returncode == 0 and "Final Performance images/sec : " in process.stdout, process.stderr
    assert len(list((tmp_path / "log").glob("*_perf.log"))) == 1


def test_a_reader_that_has_seen_enough_is_no_error():
    process = run(["bash", "-c", "$PYTHON MnasNet/main.py --dry-run --synthetic | true"], cwd=ROOT)
    assert (process.stdout, process.stderr) == ("", "")


def test_a_reader_of_the_first_line_of_help_is_no_error():
    """What follows that line finds a full pipe, waits, and then has no reader."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ
    os.write(writer, bytes(4096 - len("usage: bash MnasNet/test/train_full_1p.sh [option ...]\n\n")))
    words = ["bash", "MnasNet/test/train_full_1p.sh", "--help"]
    process = subprocess.Popen(words, cwd=str(ROOT), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    while struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"0000"))[0] < 4096 and process.poll() is None:
        pass
    os.close(reader)
    assert process.communicate()[1] == b""


@pytest.mark.parametrize("link", ["folder", "main.py"])
def test_a_link_to_a_bundle_or_to_its_main_is_as_good(link, tmp_path):
    path = tmp_path / link
    path.symlink_to(ROOT / "MnasNet" / ("" if link == "folder" else link))
    words = [path / "main.py" if link == "folder" else path, "--dry-run", "--synthetic"]
    process = run([sys.executable, *words], PYTHONSAFEPATH="1")  # with it Python leaves the folder out of its path
    assert process.returncode == 0 and "--epochs 90" in process.stdout, process.stderr


def test_a_checkpoint_folder_that_cannot_be_written(bundle_copy, few_digits, tmp_path):
    (tmp_path / "file").write_text("in the way")
    options = ["--data_path={}".format(few_digits), "--output_dir={}".format(tmp_path / "file")]
    process = run_script(bundle_copy("MnasNet"), "full_1p", *options, *small("MnasNet"))
    assert_refused(process, 1, str(tmp_path / "file"))


def test_the_exit_status_is_the_trainings(bundle_copy):
    folder = bundle_copy("MnasNet")
    (folder / "main.py").write_text(
        (folder / "main.py").read_text().replace("card = device.Device(args)", "sys.exit(37)")
    )
    process = run_script(folder, "performance_1p")
    assert process.returncode == 37
    assert "ended with status 37" in process.stderr
    assert "Final" not in process.stdout


def test_the_last_lines_of_a_failed_run_are_on_the_screen_and_in_its_log_once(bundle_copy):
    folder = bundle_copy("MnasNet")
    text = (folder / "main.py").read_text().replace("card = device.Device(args)", "raise errors.UserError('no luck')")
    (folder / "main.py").write_text(text)
    process = run_script(folder, "performance_1p", "--rank_size=2", *small("MnasNet"))
    assert_refused(process, 1, "no luck")
    log = (folder / "test" / "output" / "0" / "nohup.out").read_text()
    assert log.count("no luck") == 1 and "ended with status 1" in log


def test_an_evaluation_leaves_the_output_of_a_training_where_it_is(bundle_copy, few_digits):
    """And measures what the training measured last, since all that the network needs comes from the checkpoint."""
    folder = bundle_copy("MnasNet")
    options = ["--data_path={}".format(few_digits), "--batch_size=8", "--device=cpu"]
    assert run_script(folder, "full_1p", *options, "--max_steps=6", *small("MnasNet")).returncode == 0
    trained = result_file(folder, "acc")["TrainAccuracy"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "test" / "output" / "0").rglob("*")}
    for number in (1, 2):  # the second one moves the first one's output aside
        process = run_script(folder, "eval_1p", *options)
        assert process.returncode == 0, process.stdout + process.stderr
        assert result_file(folder, "acc", "0_eval")["TrainAccuracy"] == trained
        names = sorted(path.name.split("-")[0] for path in (folder / "test" / "output").iterdir())
        assert names == ["0", "0_eval", "0_eval.prev"][: 1 + number]
    assert {path: path.stat().st_mtime_ns for path in (folder / "test" / "output" / "0").rglob("*")} == before


def test_resume_from_the_output_folder_that_is_moved_aside(bundle_copy, noise):
    """With a MnasNet that keeps its checkpoints there, as PNASNet does, whose files are a hundred times as large."""
    folder = bundle_copy("MnasNet")
    text = (folder / "main.py").read_text()
    for place in ("NETWORK_OPTIONS, BUNDLE", "args.output_dir or BUNDLE"):
        place_of_pnasnet = place.replace("BUNDLE", "args.log_dir or BUNDLE")
        assert place_of_pnasnet in (ROOT / "PnasNet5Large" / "main.py").read_text() and text.count(place) == 1
        text = text.replace(place, place_of_pnasnet)
    (folder / "main.py").write_text(text)
    output = folder / "test" / "output" / "0"
    options = ["--data_path={}".format(noise), "--batch_size=2", "--device=cpu", *small("MnasNet")]
    assert run_script(folder, "full_1p", *options, "--max_steps=1").returncode == 0
    resume = "--resume={}/../0/checkpoint.pth.tar".format(output)
    process = run_script(folder, "full_1p", *options, "--max_steps=2", resume)
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(loss_file(folder)) == 2
    assert run_script(folder, "performance_1p", *small("MnasNet"), "--device=cpu").returncode == 0  # between them
    process = run_script(folder, "full_1p", *options, "--max_steps=3", "--resume=auto")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "resumed " in process.stdout and len(loss_file(folder)) == 3
    assert run_script(folder, "full_1p", *options, "--max_steps=1", "--learning_rate=1e38").returncode == 1  # no save
    process = run_script(folder, "full_1p", *options, "--max_steps=4", "--resume=auto")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "resumed " in process.stdout and len(loss_file(folder)) == 4


def test_seconds_count_from_the_first_line_of_the_script(bundle_copy, tmp_path):
    folder = bundle_copy("MnasNet")
    (tmp_path / "python").write_text('#!/bin/sh\nsleep 1.5\nexec {} "$@"\n'.format(os.environ["PYTHON"]))
    (tmp_path / "python").chmod(0o755)
    options = ["--max_steps=2", "--batch_size=2", *small("MnasNet")]
    assert run_script(folder, "performance_1p", *options, PYTHON=tmp_path / "python").returncode == 0
    with open(str(folder / "test" / "output" / "0" / "metrics.jsonl")) as file:
        assert json.loads(file.readline())["time"] > 3  # the log began after two starts of Python: check and training
    assert float(result_file(folder, "perf")["E2ETrainingTime"]) >= 3


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


def test_predictions_by_a_script_report_no_results_of_the_run_before(bundle_copy, few_digits):
    folder = bundle_copy("MnasNet")
    options = ["--data_path={}".format(few_digits), "--device=cpu", *small("MnasNet")]
    process = run_script(folder, "full_1p", *options, "--batch_size=8", "--max_steps=1")
    assert process.returncode == 0 and "Final Train Accuracy" in process.stdout, process.stderr
    weights = "--resume={}".format(folder / "model_best.pth.tar")
    process = run_script(folder, "full_1p", *options, weights, "--predict", few_digits / "val", cwd=folder)
    assert process.returncode == 0 and "images are in predictions.csv" in process.stdout, process.stderr
    assert "Final" not in process.stdout
    assert not list((folder / "test" / "output" / "0").glob("*_acc.log"))


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
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules[{!r}] = None".format(package))
    process = run([sys.executable, ROOT / "SPACH-SMLP" / "main.py", "--help"], PYTHONPATH=str(tmp_path))
    assert_refused(process, 1, package + " is missing for " + sys.executable, "requirements.txt")


def _home_of_cann(environment_file, **variables):
    """Return ASCEND_HOME_PATH, or "none", and the ports of HCCL after the file is sourced as launch.sh does."""
    show = "set -euo pipefail; source '{}'; echo ${{ASCEND_HOME_PATH:-none}} ${{HCCL_IF_BASE_PORT:-none}}"
    environment = {"ASCEND_HOME_PATH": "", "ASCEND_TOOLKIT_HOME": "", "HCCL_IF_BASE_PORT": "", **variables}
    command = ["env", *("-u" + name for name, value in environment.items() if not value), "bash", "-c"]
    process = run([*command, show.format(environment_file)], **{k: v for k, v in environment.items() if v})
    assert process.returncode == 0 and process.stderr == "", process.stderr
    return process.stdout.split()


@pytest.mark.parametrize("place", ["cann", "ascend-toolkit", "nnae"])
def test_cann_is_found_where_its_installer_puts_it(place, tmp_path):
    for owner in ("Ascend", "opt"):  # of a user without root, and where the installer's file says
        folder = tmp_path / owner / place
        folder.mkdir(parents=True)
        (folder / "set_env.sh").write_text("export ASCEND_HOME_PATH={}\n".format(folder))
    text = (ROOT / "common" / "npu_env.sh").read_text()
    (tmp_path / "installed").write_text("Version=9\nInstall_Path={}\nPath=x\n".format(tmp_path / "opt"))
    for information, home in ((tmp_path / "installed", "opt"), (tmp_path / "nothing", "Ascend")):
        file = tmp_path / "npu_env.sh"
        file.write_text(text.replace("/etc/Ascend/ascend_cann_install.info", str(information)))
        assert _home_of_cann(file, HOME=str(tmp_path)) == [str(tmp_path / home / place), "29700"]
    assert _home_of_cann(file, HOME=str(tmp_path / "opt")) == ["none", "none"]
    assert _home_of_cann(file, HOME=str(tmp_path), HCCL_IF_BASE_PORT="5000")[1] == "5000"


def test_the_ports_of_hccl_are_neither_ours_nor_those_that_linux_gives_to_anybody(tmp_path):
    _, first = _home_of_cann(ROOT / "common" / "npu_env.sh", ASCEND_HOME_PATH=str(tmp_path))
    ports = range(int(first), int(first) + 16)
    low, high = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert distributed.DEFAULT_PORT not in ports
    assert ports[-1] < min(int(low), 32768) or ports[0] > int(high)


def test_all_nodes_look_for_checkpoints_in_one_place(bundle_copy, few_digits):
    """PNASNet's are in the output folder."""
    folder = bundle_copy("PnasNet5Large")
    words = ["--data_path={}".format(few_digits), "--world-size=2", "--rank=1", "--addr=node0", "--dry-run"]
    process = run_script(folder, "full_8p", *words)
    assert "  --log-dir {}\n".format(folder / "test" / "output" / "0") in process.stdout, process.stderr


def test_two_nodes_may_share_a_folder(bundle_copy):
    folder = bundle_copy("MnasNet")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = "tcp://127.0.0.1:{}".format(free.getsockname()[1])
    options = ["--device=cpu", "--rank_size=1", "--max_steps=2", "--batch_size=2", *small("MnasNet")]
    options += ["--world-size", "2", "--dist-url", url]
    with ThreadPoolExecutor(2) as nodes:
        processes = [nodes.submit(run_script, folder, "performance_8p", *options, "--rank", str(n)) for n in (1, 0)]
    node_1, node_0 = (process.result() for process in processes)
    assert (node_0.returncode, node_1.returncode) == (0, 0), node_0.stderr + node_1.stderr
    assert "Final Performance" in node_0.stdout and "the results are on node 0" in node_1.stdout
    assert sorted(path.name for path in (folder / "test" / "output").iterdir()) == ["0", "0_node1"]
    assert result_file(folder, "perf")["RankSize"] == "2"


def test_the_slurm_file_starts_a_script_on_each_node(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    run_task = '#!/bin/bash\nfor n in 0 1; do SLURM_NODEID=$n bash -c "${@: -1} --dry-run --device=cpu"; done\n'
    (tmp_path / "srun").write_text(run_task)
    (tmp_path / "python").write_text("#!/bin/sh\n")
    for name in ("scontrol", "srun", "python"):
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": "{}:{}".format(tmp_path, os.environ["PATH"]), "PYTHON": str(tmp_path / "python")}
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
    process = run(["bash", ROOT / "two_nodes.sbatch"], cwd=ROOT, **variables, **job)
    assert process.returncode == 0, process.stderr
    commands = [line for line in process.stdout.splitlines() if "main.py" in line]
    assert len(commands) == 2
    for number, command in enumerate(commands):
        assert "--world-size 2 --rank {} --addr node7".format(number) in " ".join(command.split())
        assert "--device-list 0\\,1\\,2\\,3\\,4\\,5\\,6\\,7" in command and "--resume auto" in command
