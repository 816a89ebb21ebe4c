"""Reader of the logs of Ascend's old ModelZoo scripts, of which each of the five networks had a form of its own.

MnasNet and ShuffleNetV2: "Epoch: [3][ 120/5004] ... Loss 2.1 (2.3) ... Acc@1 51.2 (49.9) ... FPS 4096.1 (4080.5)";
SPNASNet: "Train: 3 [ 120/5004 ...]  Loss: 2.1 (2.3) ... fps: 3860.2", "Test: [195/195] ... Acc@1: 82.6 ( 82.665)";
SPACH-SMLP: "Epoch: [3]  [ 120/1429] ... loss: 2.1 (2.3)", "Epoch: [3] FPS: 1628.5 (0.55 s / it)";
PnasNet5Large: a table with a row for each epoch. The others' "* Acc@1 72.8 Acc@5 90.9" and "* FPS@all 4345.3" as well.
"""

import json
import os
import re
import time

from common import files

_NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"
_STEP = re.compile(r"(?:Epoch: \[(\d+)\]|Train: (\d+))\s*\[\s*(\d+)/(\d+)")
_FIELDS = (
    ("loss", re.compile(r"\bloss:?\s+" + _NUMBER, re.IGNORECASE)),
    ("acc1", re.compile(r"\bAcc@1:?\s+" + _NUMBER)),
    ("lr", re.compile(r"\blr:?\s+" + _NUMBER, re.IGNORECASE)),
    ("fps", re.compile(r"\bfps:?\s+" + _NUMBER, re.IGNORECASE)),
    ("fps", re.compile(r"\bFPS\s+[\d.]+ \(\s*{}\)".format(_NUMBER))),  # the mean of the epoch, where there is one
)
_EPOCH_FPS = re.compile(r"(?:FPS@all|Epoch: \[\d+\] FPS:)\s+" + _NUMBER)
_ACCURACY = re.compile(r"\* Acc@1\s+{0}|Test: \[\s*(\d+)/\2\].*Acc@1:\s+[\d.]+ \(\s*{0}\)".format(_NUMBER))
_ERROR = re.compile(r"\w*(?:Error|Exception)\b.*")
_AMP = re.compile(r"opt[_-]level[=' ]+(O[0-3])")
_TABLE = ["Learning Rate", "Train Loss", "Valid Loss", "Train Acc.", "Valid Acc.", "Training FPS"]


def read(folder, run):
    """Put what the files of `folder` say into `run`, a `results.Run`; `run.reason` tells of a crash."""
    logs = files.find(folder, "train_*.log") or files.find(folder, "nohup.out")
    if logs:
        run.facts["date"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(os.path.getmtime(logs[0])))
    found = _read_result_files(folder, run.facts)
    epoch_fps = []
    for path in logs:
        with open(path, encoding="utf-8", errors="replace") as file:
            _read_lines(file, run, epoch_fps)
    last_of_epoch = {record["epoch"]: record["fps"] for record in run.train if "fps" in record}
    means = epoch_fps or list(last_of_epoch.values())
    if means:
        found["fps"] = sum(means) / len(means)
    if run.train or run.evals or found.get("acc1"):
        run.facts.setdefault("device", "npu")
    if "e2e_seconds" in found:  # the old scripts wrote it whatever had happened
        if not (run.evals or found.keys() & {"fps", "acc1"}):
            run.reason = run.reason or "the script ended without a result"
        run.result.update(found)


def _read_result_files(folder, facts):
    """Return the numbers of ..._perf.log and ..._acc.log; what ran goes into `facts`."""
    words = {}
    for path in files.find(folder, "*_perf.log", "*_acc.log"):
        with open(path, encoding="utf-8", errors="replace") as file:
            words.update((key, value.strip()) for key, _, value in (line.partition(" = ") for line in file))
    if "Network" in words:
        facts["network"] = words["Network"]
    if "Device" in words:
        facts["device"] = words["Device"].split(" ")[0]
    found = {}
    for keys, target, name in (
        (("RankSize",), facts, "rank_size"),
        (("BatchSize",), facts, "batch_size"),
        (("ActualFPS", "AvgFPS"), found, "fps"),
        (("TrainAccuracy", "MaxAccuracy"), found, "acc1"),
        (("ActualLoss", "MinLoss"), found, "loss"),
        (("E2ETrainingTime",), found, "e2e_seconds"),
    ):
        for key in keys:
            if re.fullmatch(_NUMBER, words.get(key, "").rstrip("%")):
                number = float(words[key].rstrip("%"))
                target[name] = int(number) if target is facts else number
    return found


def _read_lines(lines, run, epoch_fps):
    """Add the records of a log to `run`, and the throughput of its epochs to `epoch_fps`."""
    crashed, rows = False, None
    for line in lines:
        step, accuracy, fps, amp = (form.search(line) for form in (_STEP, _ACCURACY, _EPOCH_FPS, _AMP))
        if step:
            numbers = [int(text) for text in step.groups() if text is not None]
            record = dict(zip(("epoch", "step", "steps"), numbers))
            record.update((key, float(form.search(line).group(1))) for key, form in _FIELDS if form.search(line))
            run.train.append(record)
            run.reason = ""  # it went on
        elif fps:
            epoch_fps.append(float(fps.group(1)))
        elif accuracy:
            epoch = run.train[-1]["epoch"] if run.train else 0
            run.evals.append({"epoch": epoch, "acc1": float(accuracy.group(1) or accuracy.group(3))})
        elif line.split("\t")[:6] == _TABLE:
            rows = 0
        elif rows is not None and re.match(_NUMBER + r"\t", line) and line.count("\t") >= 6:
            rate, loss, _, train_acc1, acc1, fps = (float(text) for text in line.split("\t")[:6])
            position = {"epoch": rows, "step": 1, "steps": 1}
            run.train.append(dict(position, loss=loss, acc1=train_acc1, lr=rate, fps=fps))
            run.evals.append({"epoch": rows, "acc1": acc1})
            rows += 1
        elif line.startswith("=> ") and line.endswith("}\n"):  # this project's own log, without its metrics.jsonl
            kind, text = line[3:].split(" ", 1)
            {"run": run.facts, "result": run.result}[kind].update(json.loads(text))
        elif line.startswith("Traceback"):
            crashed = True
        elif crashed and _ERROR.match(line):
            run.reason = _ERROR.match(line).group()
        if amp:
            run.facts["opt_level"] = amp.group(1)
