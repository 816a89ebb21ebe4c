"""The results tool over complete, failed, half-written and repeated runs: rows, formats, comparison, curves, files."""

import csv
import io
import json
import os
import re
import sys

import pytest
from PIL import Image

from common import parse_log
from common.errors import UserError
from tests.helpers import ROOT, run

RUN = {
    "kind": "run", "time": 0, "network": "MnasNet", "arch": "mnasnet1_0", "batch_size": 512, "rank_size": 8,
    "device": "npu", "device_name": "Ascend910B", "data": "/data/imagenet", "epochs": 2, "opt_level": "O1",
    "precision": "float16, loss scale dynamic", "torch": "2.13.0", "machine": "aarch64", "date": "2026-01-02 03:04:05",
    "args": {"lr": 1.4, "batch_size": 512, "evaluate": False},
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


@pytest.fixture
def runs(tmp_path):
    """Folders of runs of every kind, of two bundles."""
    output = tmp_path / "MnasNet" / "test" / "output"
    write(output / "complete", [*WHOLE, RESULT])
    write(output / "failed", WHOLE[:4], log="[Warning] x\n[Error] the loss is not a finite number\ntail\n")
    write(output / "half", WHOLE[:5], text='{"kind": "train", "epo')
    write(output / "refused", [], log="[Error] there is no file y\ntrain_full_1p ended with status 1; all it said\n")
    write(output / "stopped", WHOLE[:3], log="SIGTERM in epoch 0, 5 samples done: --resume x goes on\n")
    evaluation = dict(RUN, args=dict(RUN["args"], evaluate=True))
    result = {"kind": "result", "acc1": 70.0, "acc5": 90.0, "e2e_seconds": 5.0}
    write(output / "0_eval", [evaluation, EVAL, result])
    write(output / "failed_eval", [evaluation], log="[Error] x has other classes\n")
    write(tmp_path / "PnasNet5Large" / "test" / "output" / "0", [dict(RUN, precision="float32"), train(0, 10), RESULT])
    return tmp_path


def rows_of(*paths):
    return {os.path.basename(found.folder): parse_log.row(found) for found in parse_log.find_runs(map(str, paths))}


def tool(*words, **kwargs):
    return run([sys.executable, "-m", "common.parse_log", *words], cwd=ROOT, **kwargs)


def test_every_kind_of_run_has_its_row_and_failed_ones_say_why(runs):
    rows = rows_of(runs)
    assert len(rows) == 8
    whole = rows["complete"]
    assert list(whole)[:6] == ["NAME", "Acc@1", "FPS", "Epochs", "AMP_Type", "Torch_version"]
    assert list(whole.values())[:11] == [
        *("MnasNet 8p-NPU", 72.819, 14413.78, "2/2", "O1", "2.13.0", "Ascend910B", "512 x 8", "/data/imagenet"),
        *("2026-01-02 03:04:05", "complete"),
    ]
    failed = rows["failed"]
    assert (failed["Acc@1"], failed["FPS"], failed["Epochs"]) == (70.0, 1000.0, "1/2")
    states = {name: row["State"] for name, row in rows.items()}
    assert states["failed"] == "FAILED: [Error] the loss is not a finite number"
    assert states["half"] == "no end" and rows["half"]["Epochs"] == "1.5/2"
    assert states["refused"] == "FAILED: [Error] there is no file y" and rows["refused"]["NAME"] == "MnasNet ?p-?"
    assert states["stopped"].startswith("FAILED: SIGTERM in epoch 0")
    assert (rows["0"]["Epochs"], rows["0"]["AMP_Type"]) == ("0.5/2", "O0")


@pytest.mark.parametrize("chip", ["", " (this chip multiplies in float16)"])  # what `Precision.label` adds on a 910A
def test_a_run_without_mixed_precision_is_o0_on_every_chip(chip, tmp_path):
    folder = write(tmp_path / "0", [dict(RUN, precision="float32" + chip), RESULT])
    assert parse_log.row(parse_log.Run(folder))["AMP_Type"] == "O0"


def test_a_run_that_goes_on_after_a_failure_has_not_failed(tmp_path):
    log = "=> run {}\n[Error] rank 1: out of memory\nSIGTERM in epoch 0, 5 samples done: x\n=> run {}\nEpoch: [0]\n"
    assert parse_log.Run(write(tmp_path / "restarted", WHOLE[:3], log=log)).state == "no end"
    assert parse_log.Run(write(tmp_path / "again", WHOLE[:3], log=log + "[Error] x\n")).state == "FAILED: [Error] x"


def test_a_resume_that_was_refused_is_not_the_run_before(tmp_path):
    """The script has copied its metrics."""
    folder = write(tmp_path / "0", [*WHOLE, RESULT], log="[Error] it was trained with --arch x, not y\n")
    assert parse_log.Run(folder).state == "FAILED: [Error] it was trained with --arch x, not y"


def test_an_evaluation_can_be_told_from_a_training(runs):
    rows = rows_of(runs)
    row = rows["0_eval"]
    assert (row["Epochs"], row["FPS"], row["Acc@1"], row["State"]) == ("evaluation", None, 70.0, "complete")
    assert rows["failed_eval"]["Epochs"] == "evaluation"
    assert rows["failed_eval"]["State"] == "FAILED: [Error] x has other classes"


def test_runs_are_found_from_every_level_and_once(runs, tmp_path, monkeypatch):
    bundle = runs / "MnasNet"
    for path in (runs, bundle, bundle / "test", bundle / "test" / "output", bundle / "test" / "output" / "complete"):
        assert "complete" in rows_of(path), path
    assert len(parse_log.find_runs([str(bundle), str(bundle / "test" / "output")])) == 7
    (bundle / "nohup.out").write_text("of another program")
    assert len(rows_of(runs)) == 8


def test_of_steps_that_are_done_again_the_later_line_counts(tmp_path):
    """A run was killed behind its checkpoint at step 12, and logs at other steps after that, or has other ranks."""
    first = [train(0, 12, losses=[1.0] * 12), train(0, 20, losses=[2.0] * 8, acc1=1.0), dict(EVAL, acc1=10.0)]
    resumed = dict(RUN, position=12 / 20)
    again = [resumed, train(0, 17, losses=[3.0] * 5), train(0, 20, losses=[4.0] * 3, acc1=2.0), dict(EVAL, acc1=20.0)]
    found = parse_log.Run(write(tmp_path / "again", [RUN, *first, *again, RESULT]))
    assert [(record["step"], record["acc1"]) for record in found.train] == [(12, 40.0), (17, 40.0), (20, 2.0)]
    assert [record["acc1"] for record in found.evals] == [20.0]
    assert found.losses == [1.0] * 12 + [3.0] * 5 + [4.0] * 3
    # Seven ranks have three steps an epoch. The second is the first that is left, with less than it would have.
    found = parse_log.Run(write(tmp_path / "ranks", [RUN, *first, resumed, dict(train(0, 3, losses=[5.0]), steps=3)]))
    assert found.losses == [1.0] * 12 + [5.0] and not found.evals
    assert [(record["step"], record["steps"]) for record in found.train] == [(12, 20), (3, 3)]
    # With --max-steps 12 nothing is left to do.
    found = parse_log.Run(write(tmp_path / "steps", [RUN, *first, resumed, RESULT]))
    assert found.losses == [1.0] * 12 and len(found.train) == 1


def test_no_half_written_file_is_too_much(runs):
    source = runs / "MnasNet" / "test" / "output" / "complete"
    content = (source / "metrics.jsonl").read_bytes()
    for size in [0, 1, *range(2, len(content), 37)]:
        (source / "metrics.jsonl").write_bytes(content[:size] + b"\xff\xfe"[: size % 3])
        parse_log.write_table([parse_log.row(parse_log.Run(str(source)))], "text", io.StringIO())


def test_formats(runs):
    folder = runs / "MnasNet"
    markdown = tool(folder, "--format", "markdown").stdout.splitlines()
    assert markdown[0] == "| NAME | Acc@1 | FPS | Epochs | AMP_Type | Torch_version | State | Folder |"
    assert len(markdown) == 2 + 7
    start = "| MnasNet 8p-NPU | 72.819 | 14413.78 | 2/2 | O1 | 2.13.0 | complete | "
    assert markdown[3] == start + "{}/test/output/complete |".format(folder)
    as_csv = list(csv.DictReader(io.StringIO(tool(folder, "--format", "csv").stdout)))
    assert as_csv[1]["FPS"] == "14413.78" and as_csv[5]["AMP_Type"] == "" and len(as_csv) == 7
    as_json = json.loads(tool(folder, "--format", "json").stdout)
    assert as_json[1]["Acc@1"] == 72.819 and as_json[5]["AMP_Type"] is None
    assert as_csv[1]["Device"] == "Ascend910B" and as_csv[1]["Batch"] == "512 x 8"
    assert as_csv[2]["State"] == "FAILED: [Error] the loss is not a finite number"
    text = tool(folder).stdout.splitlines()
    assert text[2].index("72.819") == text[0].index("Acc@1")


def test_the_table_fits_a_screen_and_names_folders_from_where_the_reader_stands(runs):
    paths = ["MnasNet", "PnasNet5Large"]
    process = run([sys.executable, "-m", "common.parse_log", *paths], cwd=runs, PYTHONPATH=str(ROOT))
    lines = process.stdout.splitlines()
    assert max(map(len, lines)) <= 160, process.stdout
    assert lines[2].split("  ")[-1] == "MnasNet/test/output/complete"
    assert any("FAILED: [Error] the loss is not a fi ..." in line for line in lines)
    (evaluation,) = [line for line in lines if line.endswith("/0_eval")]
    assert "evaluation" in evaluation


def test_comparison_and_curves(runs, tmp_path):
    a = runs / "MnasNet" / "test" / "output" / "complete"
    records = [dict(RUN, rank_size=1, args={"lr": 0.7, "batch_size": 512}), train(0, 10, 250.0), train(0, 20, 250.0)]
    b = write(tmp_path / "output" / "b", records)
    process = tool("--compare", a, b, "--plot", tmp_path / "two.png")
    assert process.returncode == 0, process.stderr
    rows = {line.split("  ")[0]: re.split(r"\s{2,}", line)[1:] for line in process.stdout.splitlines()[1:]}
    assert rows["FPS"] == ["14413.78", "250.00", "0.017"]
    assert rows["--lr"] == ["1.4", "0.7", "0.500"]
    assert rows["loss"] == ["1.500", "3.000", "2.000"]
    assert rows["memory_gib"] == ["2.500", "2.500", "1.000"]
    assert "--batch-size" not in rows
    assert Image.open(str(tmp_path / "two.png")).size == (1200, 820)


def test_an_overlay_has_a_legend_of_all_that_it_shows_and_neither_evaluations_nor_failed_runs(runs, monkeypatch):
    from matplotlib import figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, format: drawn.append(self))
    found = {os.path.basename(str(one.folder)): one for one in parse_log.find_runs([str(runs)])}
    parse_log.draw(list(found.values()), runs / "x.png")
    (legend,) = drawn[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert [name.rsplit("/", 1)[1] for name in names] == ["complete", "half", "0"]
    assert names[0].startswith("MnasNet 8p-NPU, ")
    for panel in drawn[0].axes:
        assert len(panel.lines) == 6 and panel.lines[0].get_xdata().size and panel.lines[2].get_xdata().size
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    box, lowest = legend.get_window_extent(renderer), min(p.get_tightbbox(renderer).y0 for p in drawn[0].axes)
    assert box.x0 >= 0 and box.x1 <= 1200 and box.y0 >= 0 and box.y1 <= lowest
    parse_log.draw([found["failed"]], runs / "x.png")  # alone it is wanted
    assert len(drawn) == 2
    for names in (["0_eval"], ["failed", "stopped"]):
        with pytest.raises(UserError, match="no training to draw"):
            parse_log.draw([found[name] for name in names], runs / "x.png")


FILES = {
    "full": ["MnasNet_bs512_8p_acc.log", "MnasNet_bs512_8p_perf.log", "train_MnasNet_bs512_8p_acc_loss.txt"],
    "finetune": ["MnasNet_bs512_8p_acc.log", "MnasNet_bs512_8p_perf.log", "train_MnasNet_bs512_8p_acc_loss.txt"],
    "performance": ["MnasNet_bs512_8p_perf.log", "train_MnasNet_bs512_8p_perf_loss.txt"],
    "eval": ["MnasNet_bs512_8p_acc.log"],
}


@pytest.mark.parametrize("mode", sorted(FILES))
def test_each_mode_leaves_its_result_files(mode, tmp_path):
    folder = write(tmp_path / "0", [*WHOLE, RESULT])
    process = tool(folder, "--mode", mode)
    assert process.returncode == 0, process.stderr
    new = sorted(set(os.listdir(str(folder))) - {"metrics.jsonl", "nohup.out"})
    assert new == sorted(FILES[mode] + ["curves.png"] * (mode != "eval"))
    text = (folder / FILES[mode][0]).read_text()
    facts = dict(line.split(" = ") for line in text.splitlines())
    assert facts["Device"] == "npu (Ascend910B)" and facts["DeviceType"] == "aarch64"
    assert (facts["ActualFPS"], facts["TrainingTime"], facts["ActualLoss"]) == ("14413.78", "200.00", "1.5")
    assert facts["E2ETrainingTime"] == "77"
    if mode != "performance":
        assert (facts["TrainAccuracy"], facts["TrainAccuracy5"]) == ("72.819", "91.000")
    if mode != "eval":
        assert len((folder / FILES[mode][-1]).read_text().split()) == 40
    lines = ["Final Performance images/sec : 14413.78", "Final Train Accuracy : 72.819"]
    assert process.stdout.splitlines() == [*lines, "E2E Training Duration sec : 77"]


@pytest.mark.parametrize("missing", ["acc1", "fps"])
@pytest.mark.parametrize("mode", sorted(FILES))
def test_there_are_files_of_what_was_measured_and_without_any_one_line(mode, missing, tmp_path):
    """A training with --eval-freq 0 has no Acc@1; one that is resumed for its last evaluation may have no FPS."""
    result = {key: value for key, value in RESULT.items() if key != missing}
    folder = write(tmp_path / "0", [*WHOLE, result])
    process = tool(folder, "--mode", mode)
    kinds = {"acc1": ["perf"] * (mode != "eval"), "fps": ["acc"] * (mode != "performance")}[missing]
    assert [path.stem.rpartition("_")[2] for path in folder.glob("MnasNet*.log")] == kinds
    assert process.returncode == (0 if kinds else 1)
    if not kinds:
        text = "[Error] {}: no result files, the run has measured no {}\n".format(folder, missing)
        assert process.stderr == text and process.stdout == ""
        assert sorted(os.listdir(str(folder))) == ["metrics.jsonl", "nohup.out"]


def test_the_path_of_the_data_may_have_any_bytes(tmp_path):
    facts = dict(RUN, data=os.fsdecode(b"/data/caf\xe9\nTrainAccuracy = 99"))
    parse_log.main([str(write(tmp_path / "0", [facts, *WHOLE[1:], RESULT])), "--mode", "full"])
    lines = (tmp_path / "0" / "MnasNet_bs512_8p_acc.log").read_text("utf-8").splitlines()
    assert "Data = /data/caf??TrainAccuracy = 99" in lines and "TrainAccuracy = 72.819" in lines


def test_without_matplotlib_there_are_results_and_one_line(tmp_path):
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "matplotlib.py").write_text("raise ImportError(\"No module named 'matplotlib'\")\n")
    folder = write(tmp_path / "0", [*WHOLE, RESULT])
    process = tool(folder, "--mode", "performance", PYTHONPATH=str(tmp_path / "missing"))
    assert process.returncode == 0, process.stderr
    line = "No module named 'matplotlib' (pip install matplotlib)"
    assert process.stdout.splitlines()[-1] == "no curves.png: " + line and process.stderr == ""
    process = tool(folder, "--plot", tmp_path / "x.png", PYTHONPATH=str(tmp_path / "missing"))
    assert (process.returncode, process.stderr) == (1, "[Error] {}\n".format(line))


def test_what_is_refused_is_one_line(runs):
    output = runs / "MnasNet" / "test" / "output"
    for words, text in (
        ([runs / "nothing"], "no run there"),
        (["--compare", runs, output / "half"], "--compare needs two runs"),
        ([output / "failed", "--mode", "full"], "did not reach its end (FAILED: [Error] the loss is not a finite"),
        ([output / "0_eval", "--plot", runs / "x.png"], "no training to draw"),
        ([output / "complete", "--plot", runs / "nowhere" / "x.png"], "nowhere/x.png cannot be written: No such file"),
    ):
        process = tool(*words)
        assert process.returncode == 1
        assert text in process.stderr and process.stderr.startswith("[Error] ") and process.stderr.count("\n") == 1
    assert not (runs / "x.png").exists()


def test_the_tool_needs_no_torch(tmp_path):
    code = "import sys, common.parse_log; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run([sys.executable, "-c", code], cwd=ROOT).stdout.split() == ["False", "False"]


def test_a_run_that_goes_on_behind_half_a_line_is_what_counts(tmp_path):
    """The disk was full, or the power failed, in the middle of a line; the next record stands behind it."""
    lines = [json.dumps(record) for record in (dict(RUN, began=1.0), train(0, 10), dict(RUN, began=1.0, rank_size=2))]
    folder = write(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[1][:40] + lines[2] + "\n")
    run = parse_log.Run(folder)
    assert run.facts["rank_size"] == 2 and len(run.losses) == 10
