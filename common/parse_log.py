"""metrics.jsonl of runs, and what is made of it: result files, a table, two runs side by side, curves.

    python -m common.parse_log MnasNet SPACH-SMLP --format markdown --plot curves.png
    python -m common.parse_log --compare MnasNet/test/output/0 MnasNet/test/output/0.prev-20260101-120000

A PATH is the output folder of a run, or a folder above such folders. A line of metrics.jsonl is a JSON object of the
"kind" run (what runs, at each start), train (the steps since the one before), eval, or result (at the end).
"""

import argparse
import collections
import csv
import io
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

from common import errors
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
METRICS = "metrics.jsonl"
PERF, ACC = {"perf": "fps"}, {"acc": "acc1"}  # result files, and what the result must have for them
KINDS = {"full": {**PERF, **ACC}, "performance": PERF, "eval": ACC, "finetune": {**PERF, **ACC}}
RUN_LINES = (  # of a result file
    "Network = {network}\nRankSize = {rank_size}\nBatchSize = {batch_size}\nDeviceType = {machine}\n"
    "Device = {device} ({device_name})\nData = {data}\nCaseName = {case}\n"
)
SPEED_LINES = "ActualFPS = {fps:.2f}\nTrainingTime = {milliseconds:.2f}\nActualLoss = {loss:.6g}\n"
ACCURACY_LINES = "TrainAccuracy = {acc1:.3f}\nTrainAccuracy5 = {acc5:.3f}\n"
SHORT = ("NAME", "Acc@1", "FPS", "Epochs", "AMP_Type", "Torch_version", "State", "Folder")  # columns that fit a screen
DETAILS = ("acc5", "loss", "step_seconds", "data_seconds", "memory_gib", "skipped", "e2e_seconds")  # to compare
CURVES = {"loss": "loss", "acc1": "Acc@1 in percent (thick: val)", "lr": "learning rate", "fps": "FPS"}
RUN_FILES = (METRICS, "*/" + METRICS, "output/*/*", "test/output/*/*", "*/test/output/*/*")  # at or below a path
LAST_WORDS = (r"(?m)^(?:\[Error\]|SIG\w+ in epoch ).*", r"(?m)^train_\w+ ended with status .*")  # of a run that failed


class Run:
    """What the output folder of a run tells, however little of it there is.

    `facts` and `result` are the records "run" and "result" of metrics.jsonl ("result" is empty before the end), `train`
    and `evals` lists of the others, `losses` has the loss of each step. `state` is "complete", "no end" (it may still
    run) or "FAILED: " and why.
    """

    def __init__(self, folder):
        self.folder, self.result, found = Path(folder), {}, collections.defaultdict(dict)
        parts = self.folder.resolve().parts
        self.facts = {"network": parts[-4] if parts[-3:-1] == ("test", "output") else parts[-1]}
        for line in _read(self.folder, METRICS).splitlines():
            try:
                record = json.loads(line[line.rfind('{"kind": ') :])  # half a line of a full disk may stand before it
            except ValueError:  # half a line, of a process that was killed or that writes it now
                continue
            if record["kind"] == "run":
                if self.facts.get("began") not in (None, record.get("began")):
                    found.clear()  # it was another run
                position = record.get("position") or math.inf  # of the checkpoint: what lies behind it is done again
                for records in found.values():
                    for key in [key for key in records if key > position]:
                        del records[key]
                self.facts, self.result = record, {}
            elif record["kind"] == "result":
                self.result = record
            else:
                found[record["kind"]][progress(record)] = record
                for back, loss in enumerate(reversed(record.get("losses", ()))):
                    found["losses"][progress(record, back)] = loss
        self.train, self.evals, self.losses = (
            [found[kind][key] for key in sorted(found[kind])] for kind in ("train", "eval", "losses")
        )
        said = _read(self.folder, "train_*.log") + _read(self.folder, "nohup.out")
        said = said.rpartition("=> run ")[2]  # of the last attempt
        words = [line for pattern in LAST_WORDS for line in re.findall(pattern, said)[-1:]]
        self.state = "FAILED: " + words[0] if words else "complete" if self.result else "no end"


def progress(record, back=0):
    """Return the epochs done at a record "train" or "eval", a float; in a training also `back` steps before it."""
    return record["epoch"] + (record.get("step", 1) - back) / record.get("steps", 1)


def _read(folder, pattern):
    return "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob(pattern)))


def find_runs(paths):
    """Return the `Run`s at or below `paths`, each once; raises UserError where there is none."""
    folders = {}
    for path in paths:
        found = {file.parent for pattern in RUN_FILES for file in Path(path).glob(pattern)}
        if not found:
            raise UserError("{}: no run there, and none below as test/output/<id>".format(path))
        folders.update(dict.fromkeys(sorted(found)))
    return [Run(folder) for folder in folders]


def row(run):
    """Return the row of a `Run` in the table: a dict from column to text, float or None."""
    facts, last = run.facts, run.train[-1] if run.train else {}
    epochs = "{:g}/{}".format(round(progress(last), 3), facts["epochs"]) if last else None
    folder = os.path.relpath(run.folder)
    return {
        "NAME": "{} {}p-{}".format(facts["network"], facts.get("rank_size", "?"), facts.get("device", "?").upper()),
        "Acc@1": run.result.get("acc1", max((record["acc1"] for record in run.evals), default=None)),
        "FPS": run.result.get("fps", last.get("fps")),  # over the run, or where it stands
        "Epochs": "evaluation" if facts.get("args", {}).get("evaluate") else epochs,
        "AMP_Type": "O0" if "float32" in facts.get("precision", "") else facts.get("opt_level"),
        "Torch_version": facts.get("torch"),
        "Device": facts.get("device_name"),
        "Batch": "{batch_size} x {rank_size}".format(**facts) if "batch_size" in facts else None,
        "Data": facts.get("data"),
        "Date": facts.get("date"),
        "State": run.state,
        "Folder": str(run.folder) if folder.startswith("..") else folder,
    }


def comparison(runs):
    """Return the rows of two `Run`s side by side: what the table has, details, and the arguments that differ."""
    columns, rows = [], []
    for run in runs:
        last = dict(run.train[-1] if run.train else {}, **run.result)
        args = {"--" + name.replace("_", "-"): value for name, value in run.facts.get("args", {}).items()}
        columns.append({**row(run), **{name: last.get(name) for name in DETAILS}, **args})
    for name in {**columns[0], **columns[1]}:
        a, b = (column.get(name) for column in columns)
        if a != b or not name.startswith("--"):
            is_number = all(type(value) in (int, float) for value in (a, b)) and a
            rows.append({"": name, "A": _text(name, a), "B": _text(name, b), "Ratio": b / a if is_number else None})
    return rows


def _text(name, value):
    if isinstance(value, float) and not name.startswith("--"):
        return "{:.{}f}".format(value, 2 if name == "FPS" else 3)
    return "-" if value is None else str(value)


def write_table(rows, form, out):
    """Write `rows`, dicts of the same keys, to the file `out` as "csv", "json"; short as "text" or "markdown"."""
    if form == "json":
        return out.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    if form == "csv":
        return csv.writer(out, lineterminator="\n").writerows([rows[0], *(line.values() for line in rows)])
    columns = [name for name in rows[0] if name in SHORT or "NAME" not in rows[0]]
    lines = [columns] + [[_text(name, line[name]) for name in columns] for line in rows]
    lines = [[cell if len(cell) <= 40 else cell[:36] + " ..." for cell in line[:-1]] + line[-1:] for line in lines]
    if form == "markdown":
        lines.insert(1, ["---"] * len(columns))
        out.writelines("| {} |\n".format(" | ".join(cell.replace("|", "\\|") for cell in line)) for line in lines)
    else:
        widths = [max(map(len, column)) for column in zip(*lines)]
        out.writelines("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def write_results(run, mode):
    """Write and print what ModelZoo's script for `mode` does, or raise UserError where the run did not get so far."""
    if run.state != "complete":
        raise UserError("{}: the run did not reach its end ({})".format(run.folder, run.state))
    texts, values = {}, {**run.facts, **run.result, "milliseconds": 1000 * run.result.get("step_seconds", 0)}
    values["data"] = errors.printable(values["data"])  # a path, which may be no UTF-8, or have a line end in it
    kinds = [kind for kind, needed in KINDS[mode].items() if needed in values]  # --eval-freq 0 measures no Acc@1
    if not kinds:
        text = "{}: no result files, the run has measured no {}"
        raise UserError(text.format(run.folder, " and no ".join(KINDS[mode].values())))
    for kind in kinds:
        values["case"] = "{network}_bs{batch_size}_{rank_size}p_{}".format(kind, **values)
        text = RUN_LINES + SPEED_LINES * ("fps" in values) + ACCURACY_LINES * (kind == "acc")
        texts[values["case"] + ".log"] = (text + "E2ETrainingTime = {e2e_seconds:.0f}\n").format(**values)
    if mode != "eval":
        texts["train_{case}_loss.txt".format(**values)] = "".join("{:.8g}\n".format(loss) for loss in run.losses)
    for name, text in texts.items():
        errors.write_atomic(run.folder / name, text.encode())
    shown = "Final Performance images/sec : {fps:.2f}\n" * ("fps" in values)
    shown += "Final Train Accuracy : {acc1:.3f}\n" * ("acc1" in values)
    print((shown + "E2E Training Duration sec : {e2e_seconds:.0f}").format(**values))
    try:
        if mode != "eval":
            draw([run], run.folder / "curves.png")
    except Exception as error:  # the run is complete, whatever a library that only draws comes up with
        print("no curves.png: {}".format(error))


def draw(runs, path):
    """Draw the trainings among `runs` into the PNG file `path`, without failed ones where they are several."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("{} (pip install matplotlib)".format(error)) from None
    runs = [run for run in runs if run.train and (len(runs) == 1 or not run.state.startswith("FAILED"))]
    if not runs:
        raise UserError("there is no training to draw, or all have failed")
    height, legend = 7.8 + 0.2 * len(runs), 0.2 + 0.2 * len(runs)  # in inches
    figure, picture = Figure(figsize=(12, height), dpi=100), io.BytesIO()
    for panel, (key, title) in zip(figure.subplots(2, 2).flatten(), CURVES.items()):
        panel.set(title=title, xlabel="epochs done")
        panel.grid(alpha=0.3)
        for number, run in enumerate(runs):
            # Without the first steps, which set everything up.
            for width, records in ((1, run.train[1:] or run.train), (3, run.evals if key == "acc1" else [])):
                shown = records[:: len(records) // 500 + 1]  # more points hide each other
                line = panel.plot([progress(record) for record in shown], [record[key] for record in shown], marker="o")
                line[0].set(color="C{}".format(number), linewidth=width, markersize=2 * width)
    names = ["{NAME}, {Folder}".format(**row(run)) for run in runs]
    figure.legend(panel.lines[::2], names, loc="lower center", fontsize="small")  # a run has two lines
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    figure.savefig(picture, format="png")
    errors.write_atomic(path, picture.getvalue())


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m common.parse_log", description=__doc__, formatter_class=form)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="default: all runs of this repository")
    parser.add_argument("--format", default="text", choices=["text", "markdown", "csv", "json"], help="default: text")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs side by side, with ratios")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the curves of all runs over each other")
    parser.add_argument("--mode", choices=sorted(KINDS), help="write the result files of the run at PATH (launch.sh)")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    args = parser.parse_args(argv)
    runs = find_runs(args.compare or args.paths or [ROOT])
    if args.mode:
        return write_results(runs[0], args.mode)
    if args.compare and len(runs) != 2:
        raise UserError("--compare needs two runs, there are {}: name their output folders".format(len(runs)))
    write_table(comparison(runs) if args.compare else [row(run) for run in runs], args.format, sys.stdout)
    return draw(runs, args.plot) if args.plot else None


if __name__ == "__main__":
    sys.exit(errors.run(main))
