"""metrics.jsonl of runs, and what is made of it: result files, a table, two runs side by side, curves.

    python -m common.parse_log                                    all runs of all bundles
    python -m common.parse_log MnasNet --format markdown          those of one bundle; also text, csv, json
    python -m common.parse_log --compare MnasNet/test/output/0 MnasNet/test/output/0.prev-20260101-120000
    python -m common.parse_log MnasNet SPACH-SMLP --plot curves.png

A PATH is the output folder of a run, or a folder above such folders. A line of metrics.jsonl is a JSON object of the
"kind" run (what runs, at each start), train (the steps since the one before), eval, or result (at the end).
"""

import argparse
import contextlib
import csv
import glob
import io
import json
import os
import re
import signal
import sys

from common import errors
from common.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
METRICS, POINTS = "metrics.jsonl", 500  # of a curve: more of them hide each other
PERF, ACC = {"perf": "fps"}, {"acc": "acc1"}  # result files, and what the result must have for them
KINDS = {"full": {**PERF, **ACC}, "performance": PERF, "eval": ACC, "finetune": {**PERF, **ACC}}
DETAILS = ("acc5", "loss", "step_seconds", "data_seconds", "memory_gib", "skipped", "e2e_seconds")  # to compare
RUN_FILES = [METRICS, "train_*.log", "*/" + METRICS, "*/train_*.log"]  # they tell a run at or below a path
RUN_FILES += ["output/*/*", "test/output/*/*", "*/test/output/*/*"]
LAST_WORDS = re.compile(r"^(\[Error\].*|SIG[A-Z]+ in epoch .*|train_\w+ ended with status .*)", re.MULTILINE)


class Run:
    """What the output folder of a run tells, however little of it there is.

    Attributes:
        folder: its path.
        facts: the record "run" of metrics.jsonl: "network", "rank_size", "batch_size" (per card), "args", ...
        train, evals, losses: lists of the records "train" and "eval", and of the loss of each step.
        result: the record "result": "fps", "acc1", "loss", "e2e_seconds", ...; empty before the end.
        state: "complete", "no end" (it may still run) or "FAILED: " and why.
    """

    def __init__(self, folder):
        parts, path = os.path.abspath(folder).split(os.sep), os.path.join(folder, METRICS)
        self.folder, self.result, records, losses = folder, {}, {"train": {}, "eval": {}}, {}
        self.facts = {"network": parts[-4] if parts[-3:-1] == ["test", "output"] else parts[-1]}
        for record in _records(path):
            if record["kind"] == "run":
                self.facts, self.result = record, {}
            elif record["kind"] == "result":
                self.result = record
            else:
                records[record["kind"]][progress(record)] = record  # what is done again after a crash counts once
            for back, loss in enumerate(reversed(record.get("losses", ()))):
                losses[record["epoch"], (record["step"] - back) / record["steps"]] = loss
        self.train, self.evals = ([found[key] for key in sorted(found)] for found in records.values())
        self.losses = [losses[key] for key in sorted(losses)]
        self.state = "complete" if self.result else _last_words(folder)

    @property
    def epochs(self):
        """What was trained: "90", "12.5/90" without an end, "1000 steps"; or "evaluation"; or None."""
        if not self.train:
            return "evaluation" if self.evals or self.facts.get("args", {}).get("evaluate") else None
        done, wanted = progress(self.train[-1]), self.facts["epochs"]
        if not self.result:
            return "{:.1f}/{}".format(done, wanted)
        return str(wanted) if done >= wanted else "{} steps".format(len(self.losses))


def progress(record):
    """Return the epochs done at a record "train" or "eval", a float."""
    return record["epoch"] + record.get("step", 1) / record.get("steps", 1)


def _records(path):
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # half a line, of a process that was killed or that writes it now
                yield json.loads(line)


def _files(folder, *patterns):
    return sorted(path for pattern in patterns for path in glob.glob(os.path.join(glob.escape(folder), pattern)))


def _last_words(folder):
    """Return "FAILED: " and the last line that says why a run ended, or "no end"."""
    words = []
    for path in _files(folder, "train_*.log", "nohup.out"):
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            words += LAST_WORDS.findall(file.read().decode("utf-8", "replace"))
    words = [line for line in words if line.startswith("[Error]")] or words
    return "FAILED: " + words[-1] if words else "no end"


def find_runs(paths):
    """Return the `Run`s at or below `paths`, each once; raises UserError where there is none."""
    folders = []
    for path in paths:
        found = sorted({os.path.dirname(file) for file in _files(path, *RUN_FILES)})
        if not found:
            raise UserError("{}: no run there, and none below as test/output/<id>".format(path))
        folders += found
    return [Run(folder) for folder in dict.fromkeys(folders)]


def row(run):
    """Return the row of a `Run` in the table: a dict from column to text, float or None."""
    facts, last = run.facts, run.train[-1] if run.train else {}
    return {
        "NAME": "{} {}p-{}".format(facts["network"], facts.get("rank_size", "?"), facts.get("device", "?").upper()),
        "Acc@1": run.result.get("acc1", max((record["acc1"] for record in run.evals), default=None)),
        "FPS": run.result.get("fps", last.get("fps")),  # over the run, or where it stands
        "Epochs": run.epochs,
        "AMP_Type": "O0" if facts.get("precision") == "float32" else facts.get("opt_level"),
        "Torch_version": facts.get("torch"),
        "Device": facts.get("device_name"),
        "Batch": "{batch_size} x {rank_size}".format(**facts) if "batch_size" in facts else None,
        "Data": facts.get("data"),
        "Date": facts.get("date"),
        "State": run.state,
        "Folder": run.folder,
    }


def comparison(a, b):
    """Return the rows of two runs side by side: what the table has, details, and the arguments that differ."""
    columns, rows = [], []
    for run in (a, b):
        last = dict(run.train[-1] if run.train else {}, **run.result)
        args = {"--" + name.replace("_", "-"): value for name, value in run.facts.get("args", {}).items()}
        columns.append(dict(row(run), **{name: last.get(name) for name in DETAILS}, **args))
    for name in {**columns[0], **columns[1]}:
        a, b = columns[0].get(name), columns[1].get(name)
        ratio = b / a if type(a) in (int, float) and type(b) in (int, float) and a else None
        if a != b or not name.startswith("--"):
            rows.append({"": name, "A": _text(name, a), "B": _text(name, b), "Ratio": ratio})
    return rows


def _text(name, value):
    if isinstance(value, float) and not name.startswith("--"):
        return "{:.{}f}".format(value, 2 if name == "FPS" else 3)
    return "-" if value is None else str(value)


def write_table(rows, form, out):
    """Write `rows`, dicts of the same keys, to the file `out` in the `form` "text", "markdown", "csv" or "json"."""
    lines = [list(rows[0])] + [[_text(*item) for item in line.items()] for line in rows]
    if form == "json":
        out.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    elif form == "csv":
        csv.writer(out, lineterminator="\n").writerows(["" if cell == "-" else cell for cell in line] for line in lines)
    elif form == "markdown":
        lines.insert(1, ["---"] * len(lines[0]))
        out.writelines("| {} |\n".format(" | ".join(cell.replace("|", "\\|") for cell in line)) for line in lines)
    else:
        widths = [max(map(len, column)) for column in zip(*lines)]
        out.writelines("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def write_results(run, mode):
    """Write and print what ModelZoo's script for `mode` does, or raise UserError where the run did not get so far."""
    if run.state != "complete":
        raise UserError("{}: the run did not reach its end ({})".format(run.folder, run.state))
    texts, values = {}, dict(run.facts, **run.result)
    for kind, needed in KINDS[mode].items():
        if needed not in values:
            raise UserError("{}: no result files, the run has measured no {}".format(run.folder, needed))
        values["case"] = "{network}_bs{batch_size}_{rank_size}p_{}".format(kind, **values)
        lines = ["Network = {network}", "RankSize = {rank_size}", "BatchSize = {batch_size}", "DeviceType = {machine}"]
        lines += ["Device = {device} ({device_name})", "Data = {data}", "CaseName = {case}"]
        if "fps" in values:
            values["milliseconds"] = 1000 * values["step_seconds"]
            lines += ["ActualFPS = {fps:.2f}", "TrainingTime = {milliseconds:.2f}", "ActualLoss = {loss:.6g}"]
        if kind == "acc":
            lines += ["TrainAccuracy = {acc1:.3f}", "TrainAccuracy5 = {acc5:.3f}"]
        lines += ["E2ETrainingTime = {e2e_seconds:.0f}", ""]
        texts[values["case"] + ".log"] = "\n".join(lines).format(**values)
    if mode != "eval":
        texts["train_{case}_loss.txt".format(**values)] = "".join("{:.8g}\n".format(loss) for loss in run.losses)
    for name, text in texts.items():
        _replace(os.path.join(run.folder, name), text.encode())
    shown = ["Final Performance images/sec : {fps:.2f}"] * ("fps" in values)
    shown += ["Final Train Accuracy : {acc1:.3f}"] * ("acc1" in values)
    print("\n".join([*shown, "E2E Training Duration sec : {e2e_seconds:.0f}"]).format(**values))


def _replace(path, data):
    """Write the file `path` whole or not at all; raises UserError where it cannot be written."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(data)
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise UserError("{}: {}".format(path, error.strerror)) from None


def draw(runs, path):
    """Draw loss, Acc@1, learning rate and FPS of `Run`s into the PNG file `path`; raise UserError where that fails."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("{} (pip install matplotlib)".format(error)) from None
    runs = [run for run in runs if run.train]
    if not runs:
        raise UserError("there are no training steps to draw")
    figure, picture = Figure(figsize=(12, 8), dpi=100), io.BytesIO()
    panels, in_steps = figure.subplots(2, 2).flatten(), all(progress(run.train[-1]) < 1 for run in runs)
    for panel, title in zip(panels, ("loss", "Acc@1 in percent (thick: val)", "learning rate", "FPS")):
        panel.set(title=title, xlabel="step" if in_steps else "epochs done")
        panel.grid(alpha=0.3)
    for number, run in enumerate(runs):
        color, timed = "C{}".format(number % 10), run.train[1:] or run.train  # the first steps set everything up
        lines = zip((*panels, panels[1]), ("loss", "acc1", "lr", "fps", "acc1"), (*[run.train] * 3, timed, run.evals))
        for panel, key, records in lines:
            shown, width = records[:: len(records) // POINTS + 1], 2.5 if records is run.evals else 1
            last = run.train[-1]["step"]  # of an evaluation, which has none of its own
            xs = [record.get("step", last) if in_steps else progress(record) for record in shown]
            panel.plot(xs, [record[key] for record in shown], marker=".", color=color, linewidth=width)
        title = row(run)["NAME"] + "   " + run.facts["date"] + "   " + run.folder
        figure.text(0.06, 0.98 - 0.025 * number, title, color=color, va="top")
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.07, top=0.92 - 0.025 * len(runs), hspace=0.3, wspace=0.15)
    figure.savefig(picture, format="png")
    _replace(path, picture.getvalue())


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m common.parse_log", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="default: all runs of this repository")
    parser.add_argument("--format", default="text", choices=["text", "markdown", "csv", "json"], help="default: text")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs side by side, with ratios")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the curves of all runs over each other")
    parser.add_argument("--mode", choices=sorted(KINDS), help="write the result files of the run at PATH (launch.sh)")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    args = parser.parse_args(argv)
    runs = find_runs(args.compare or args.paths or [ROOT])
    if args.mode:
        write_results(runs[0], args.mode)
        if args.mode != "eval":
            try:
                draw(runs, os.path.join(runs[0].folder, "curves.png"))
            except Exception as error:  # the run is complete, whatever a library that only draws comes up with
                print("no curves.png: {}".format(error))
        return
    if args.compare and len(runs) != 2:
        raise UserError("--compare needs two runs, there are {}: name their output folders".format(len(runs)))
    write_table(comparison(*runs) if args.compare else [row(run) for run in runs], args.format, sys.stdout)
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    sys.exit(errors.run(main))
