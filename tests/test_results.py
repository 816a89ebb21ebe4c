"""The results tool over complete, failed, running, half-written and old runs: rows, formats, comparison, curves."""

import csv
import fcntl
import io
import json
import os
import re
import sys
import time

import pytest
from PIL import Image

from common import results, tables
from tests.bundles import ROOT
from tests.conftest import run

RUN = {
    "kind": "run", "time": 0, "network": "MnasNet", "arch": "mnasnet1_0", "batch_size": 512, "rank_size": 8,
    "device": "npu", "device_name": "Ascend910B", "data": "/data/imagenet", "epochs": 2, "opt_level": "O1",
    "precision": "float16, loss scale dynamic", "torch": "2.13.0", "machine": "aarch64", "date": "2026-01-02 03:04:05",
    "args": {"lr": 1.4, "batch_size": 512},
}  # fmt: skip


def train(epoch, step, fps=1000.0, **more):
    record = {"kind": "train", "time": 1, "epoch": epoch, "step": step, "steps": 20, "loss": 3.0 - epoch, "lr": 0.1}
    record.update(losses=[3.0 - epoch] * 10, acc1=40.0, acc5=80.0, fps=fps, data_seconds=0.1, step_seconds=0.5)
    return dict(record, memory_gib=2.5, skipped=3, **more)


EVAL = {"kind": "eval", "epoch": 0, "acc1": 70.0, "acc5": 90.0, "images": 10, "unreadable": 0}
RESULT = {"kind": "result", "fps": 14413.78, "step_seconds": 0.2, "loss": 1.5, "acc1": 72.819, "acc5": 91.0}
RESULT["e2e_seconds"] = 77.0
WHOLE = [
    RUN,
    *(train(0, s) for s in (10, 20)),
    EVAL,
    *(train(1, s) for s in (10, 20)),
    dict(EVAL, epoch=1, acc1=72.819),
]


def write(folder, records, text="", log=""):
    """Make the output folder of a run."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if records:
        (folder / "metrics.jsonl").write_text(lines + text)
    (folder / "nohup.out").write_text(log)
    return folder


def write_old(folder, case, log, keys):
    """Make the output folder of an old script: its log, and the file of keys unless `keys` is None."""
    folder.mkdir(parents=True)
    (folder / "train_0.log").write_text(log)
    if keys is not None:
        words = {"Network": case.split("_bs")[0], "RankSize": 8, "BatchSize": 4096}
        lines = ["{} = {}".format(*item) for item in dict(words, **keys, E2ETrainingTime=9).items()]
        (folder / (case + ".log")).write_text("\n".join(lines) + "\n")


OLD_EPOCH = (
    "Epoch: [{0}][{1:4d}/313]\tTime  0.284 ( 0.283)\tData  0.001 ( 0.002)\tLoss 2.1e+00 (2.2e+00)\tAcc@1  51.20 \
( 49.88)\tAcc@5  75.10 ( 74.02)\tFPS 14422.54 ({2:.2f})\n"
)
MNASNET = "".join(OLD_EPOCH.format(e, s, 14000 + 100 * e + s) for e in (0, 1) for s in (0, 310)) + (
    " * Acc@1 71.000 Acc@5 90.000\n * Acc@1 70.500 Acc@5 90.100\n"
)
SHUFFLENET = (
    "[npu id: 0 ] Namespace(amp=True, arch='shufflenet_v2_x1_0', opt_level='O2', loss_scale=64.0)\n"
    "[npu id: 0 ] Epoch: [0][  0/157]\tTime 60.1 (60.1)\tData 9.0 (9.0)\tLoss 6.9e+00 (6.9e+00)\tAcc@1 0.10 (0.10)\n"
    "[npu id: 0 ] * FPS@all 17000.000, TIME@all 0.480\n[npu id: 0 ] [AVG-ACC] * Acc@1 66.246 Acc@5 86.800\n"
    "[npu id: 0 ] Epoch: [1][  0/157]\tTime 0.48 (0.48)\tData 0.0 (0.0)\tLoss 6.0e+00 (6.0e+00)\tAcc@1 9.0 (9.0)\n"
    "[npu id: 0 ] * FPS@all 17658.652, TIME@all 0.464\n[npu id: 0 ] [AVG-ACC] * Acc@1 66.000 Acc@5 86.700\n"
)
SPNASNET = (
    "Train: 0 [   0/625 (  0%)]  Loss:  6.933340 (6.9333)  Time: 9.1s,  224.1/s  (9.1s,  224.1/s)  LR: 1.000e-04  "
    "Data: 1.0 (1.0)fps: 224.100  Batch_Size:256.0 \n"
    "Train: 0 [ 624/625 (100%)]  Loss:  5.1 (6.0)  Time: 0.5s, 3860.24/s  (0.5s, 3860.24/s)  LR: 1.000e-04  "
    "Data: 0.0 (0.0)fps: 3860.241  Batch_Size:256.0 \n"
    "Test: [   0/24]  Time: 1.0 (1.0)  Loss:  1.5 (1.5)  Acc@1: 70.0000 (70.0000)  Acc@5: 90.0 (90.0)fps: 99.0\n"
    "Test: [  24/24]  Time: 1.0 (1.0)  Loss:  1.5 (1.5)  Acc@1: 75.0000 (74.5710)  Acc@5: 90.0 (90.0)fps: 99.0\n"
)
SMLP = (
    "[2022-01-01 00:00:00] (main.py 62): INFO Epoch: [0]  [   0/1429]  eta: 1:00:00  lr: 0.000001  loss: 6.9 (6.9)\n"
    "[2022-01-01 00:10:00] (utils.py 222): INFO Epoch: [0] FPS: 1628.5 (0.5502 s / it)\n"
    "Test: FPS: 4000.0 (0.22 s / it)\n* Acc@1 80.900 Acc@5 95.300 loss 0.900\n"
)
PNASNET = (
    "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc.\tTraining FPS\t\n"
    "0.400000\t5.500000\t4.100000\t9.100000\t20.500000\t351.000000\t\n"
    "0.388000\t3.500000\t3.100000\t39.100000\t79.625000\t355.000000\t\n0.37636"
)


@pytest.fixture
def runs(tmp_path):
    """Folders of runs of every kind; the lock of the running one is held."""
    output = tmp_path / "MnasNet" / "test" / "output"
    write(output / "complete", [*WHOLE, RESULT])
    write(
        output / "failed",
        WHOLE[:4],
        log="Epoch: [0]...\n[Error] the loss is not a finite number\ntrain_full_8p ended\n",
    )
    write(output / "killed", WHOLE[:5], text='{"kind": "train", "epo')
    write(output / "refused", [], log="[Error] there is no file y\ntrain_full_1p ended with status 1; all it said\n")
    write(output / "running", WHOLE[:5])
    write(output / "starting", [], log="warming up\n")
    write_old(
        output / "old", "MnasNet_for_PyTorch_bs4096_8p_acc", MNASNET, {"ActualFPS": "(", "TrainAccuracy": "70.500"}
    )
    crash = MNASNET[:300] + "\nTraceback (most recent call last):\n  File x\nRuntimeError: NPU out of memory.\n"
    write_old(output / "old_crash", "MnasNet_for_PyTorch_bs4096_8p_acc", crash, {"ActualFPS": ""})
    write_old(output / "old_running", "x_bs1_8p_acc", MNASNET[:400], None)
    others = tmp_path / "others" / "test" / "output"
    write_old(others / "shufflenet", "ShuffleNetV2_bs8192_8p_acc", SHUFFLENET, {"ActualFPS": "17329.3"})
    write_old(others / "spnasnet", "SPNASNet_100_bs256_8p_perf", SPNASNET, {"ActualFPS": "3860.241"})
    write_old(others / "smlp", "SPACH-SMLP_bs112_8p_acc", SMLP, {"AvgFPS": "814.25", "MaxAccuracy": "80.90%"})
    write_old(others / "pnasnet", "PnasNet5Large_bs32_8p_acc", PNASNET, {"ActualFPS": "355"})
    with open(str(output / "running" / "metrics.jsonl"), "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield tmp_path


def rows_of(folder):
    return {os.path.basename(path): tables.row(results.read(path)) for path in results.find(str(folder))}


def tool(*words):
    return run([sys.executable, "-m", "common.parse_log", *words], cwd=ROOT)


def test_every_kind_of_run_has_its_row(runs):
    rows = rows_of(runs)
    assert len(rows) == 13
    whole = rows["complete"]
    assert list(whole)[:6] == ["NAME", "Acc@1", "FPS", "Epochs", "AMP_Type", "Torch_version"]
    assert list(whole.values())[:11] == [
        *("MnasNet 8p-NPU", 72.819, 14413.78, "2", "O1", "2.13.0", "Ascend910B", "512 x 8", "/data/imagenet"),
        *("2026-01-02 03:04:05", "complete"),
    ]
    failed = rows["failed"]
    assert (failed["Acc@1"], failed["FPS"], failed["Epochs"]) == (70.0, 1000.0, "1.0/2")
    states = {name: row["State"] for name, row in rows.items()}
    assert states["failed"] == "FAILED: [Error] the loss is not a finite number"
    assert states["killed"] == "FAILED: no end, and no word why: killed?"
    assert states["refused"] == "FAILED: [Error] there is no file y"
    assert states["running"] == states["starting"] == states["old_running"] == "running"
    assert rows["running"]["Epochs"] == "1.5/2"
    assert states["old_crash"] == "FAILED: RuntimeError: NPU out of memory."


@pytest.mark.parametrize(
    "name, expected",
    [
        ("old", ("MnasNet_for_PyTorch 8p-NPU", 71.0, (14310 + 14410) / 2, "2", None)),
        ("shufflenet", ("ShuffleNetV2 8p-NPU", 66.246, 17329.326, "2", "O2")),
        ("spnasnet", ("SPNASNet_100 8p-NPU", 74.571, 3860.241, "1", None)),
        ("smlp", ("SPACH-SMLP 8p-NPU", 80.9, 1628.5, "1", None)),
        ("pnasnet", ("PnasNet5Large 8p-NPU", 79.625, 353.0, "2", None)),
    ],
)
def test_old_logs(name, expected, runs):
    row = rows_of(runs)[name]
    assert (row["NAME"], row["Acc@1"], pytest.approx(row["FPS"]), row["Epochs"], row["AMP_Type"]) == expected
    assert row["State"] == "complete"


def test_an_evaluation_and_a_run_of_some_steps(tmp_path):
    write(tmp_path / "output" / "eval", [RUN, EVAL, {"kind": "result", "acc1": 70.0, "acc5": 90.0, "e2e_seconds": 5}])
    write(tmp_path / "output" / "steps", [dict(RUN, precision="float32"), train(0, 10), RESULT])
    rows = rows_of(tmp_path)
    assert (rows["eval"]["Epochs"], rows["eval"]["FPS"], rows["eval"]["Acc@1"]) == (None, None, 70.0)
    assert (rows["steps"]["Epochs"], rows["steps"]["AMP_Type"]) == ("10 steps", "O0")


def test_this_projects_log_without_its_metrics(tmp_path):
    folder = write(tmp_path / "output" / "0", [])
    facts = {key: value for key, value in RUN.items() if key not in ("kind", "args")}
    text = "=> run {}\n{} * Acc@1 72.819 Acc@5 91.0\n * FPS@all 14413.780, TIME@all 0.2\n=> result {}\n=> run {{\n"
    (folder / "train_0.log").write_text(text.format(json.dumps(facts), MNASNET, json.dumps(RESULT)))
    row = rows_of(tmp_path)["0"]
    assert (row["NAME"], row["FPS"], row["Acc@1"], row["State"]) == ("MnasNet 8p-NPU", 14413.78, 72.819, "complete")
    assert row["Epochs"] == "2"


@pytest.mark.parametrize("name", ["complete", "old", "shufflenet", "pnasnet", "smlp", "spnasnet"])
def test_no_half_written_file_is_too_much(name, runs, tmp_path):
    source = next(path for path in runs.rglob(name) if path.is_dir())
    path = source / ("metrics.jsonl" if name == "complete" else "train_0.log")
    content = path.read_bytes()
    for size in [0, 1, *range(2, len(content), 37)]:
        path.write_bytes(content[:size] + b"\xff\xfe"[: size % 3])
        tables.as_text([tables.row(results.read(str(source)))])


def test_formats(runs):
    folder = runs / "MnasNet"
    markdown = tool(folder, "--format", "markdown").stdout.splitlines()
    assert markdown[0].startswith("| NAME | Acc@1 | FPS | Epochs | AMP_Type | Torch_version | Device | Batch |")
    assert len(markdown) == 2 + 9
    assert "| MnasNet 8p-NPU | 72.819 | 14413.78 | 2 | O1 | 2.13.0 | Ascend910B | 512 x 8 |" in markdown[2]
    as_csv = list(csv.DictReader(io.StringIO(tool(folder, "--format", "csv").stdout)))
    assert as_csv[0]["FPS"] == "14413.78" and as_csv[6]["AMP_Type"] == "" and len(as_csv) == 9
    as_json = json.loads(tool(folder, "--format", "json").stdout)
    assert as_json[0]["Acc@1"] == 72.819 and as_json[6]["AMP_Type"] is None
    text = tool(folder).stdout.splitlines()
    assert text[1].index("72.819") == text[0].index("Acc@1")


def test_comparison_and_curves(runs, tmp_path):
    a = runs / "MnasNet" / "test" / "output" / "complete"
    records = [dict(RUN, rank_size=1, args={"lr": 0.7, "batch_size": 512}), train(0, 10, 250.0), train(0, 20, 250.0)]
    b = write(tmp_path / "output" / "b", records)
    process = tool("--compare", a, b, "--plot", tmp_path / "two.png")
    assert process.returncode == 0, process.stderr
    rows = {line.split("  ")[0]: re.split(r"\s{2,}", line)[1:] for line in process.stdout.splitlines()[1:]}
    assert rows["FPS"] == ["14413.78", "250.00", "0.017"]
    assert rows["--lr"] == ["1.4", "0.7", "0.500"]
    assert rows["Share of waiting for data"] == ["0.200", "0.200", "1.000"]
    assert "--batch-size" not in rows
    assert Image.open(str(tmp_path / "two.png")).size == (1200, 800)


def test_what_is_refused_is_one_line(runs):
    output = runs / "MnasNet" / "test" / "output"
    for words, text in (
        ([runs / "nothing"], "no run there"),
        (["--compare", runs, output / "old"], "--compare needs two runs"),
        ([output / "failed", "--mode", "full"], "did not reach its end ([Error] the loss is not a finite number)"),
    ):
        process = tool(*words)
        assert process.returncode == 1
        assert text in process.stderr and process.stderr.startswith("[Error] ") and process.stderr.count("\n") == 1


def test_a_silent_old_run_is_dead(runs):
    folder = runs / "MnasNet" / "test" / "output" / "old_running"
    for path in folder.iterdir():
        os.utime(str(path), (time.time() - 3600,) * 2)
    assert results.read(str(folder)).state == "failed"
