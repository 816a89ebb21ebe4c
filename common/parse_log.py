"""The one reader of log lines: turns a finished run's log into the result files of ModelZoo.

    python -m common.parse_log FOLDER --mode full|performance|eval|finetune

writes <Network>_bs<batch>_<n>p_perf.log, ..._acc.log and train_<case>_loss.txt into the folder and prints the three
`Final` lines. A log without an end is no result: exit status 1, no file.
"""

import argparse
import glob
import json
import os
import sys

KINDS = {"full": ("perf", "acc"), "performance": ("perf",), "eval": ("acc",), "finetune": ("perf", "acc")}


class IncompleteLog(Exception):
    """The log does not hold what a result needs; the text says what is missing."""


def parse(path):
    """Return (facts, result): what ran and what came out, two dicts, of the log file `path`.

    Raises:
        IncompleteLog: the run did not reach its end.
        OSError: the file cannot be read.
    """
    found = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            for kind in ("run", "result"):
                if line.startswith("=> {} ".format(kind)):
                    found[kind] = json.loads(line[len(kind) + 4 :])
    for kind in ("run", "result"):
        if kind not in found:
            raise IncompleteLog("{}: no '=> {}' line, the run did not reach it".format(path, kind))
    return found["run"], found["result"]


def losses(path):
    """Return every step's loss of the metrics file `path`, in order."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [loss for record in records if record["kind"] == "train" for loss in record["losses"]]


def result_lines(facts, result, case):
    """Return the `key = value` lines of a result file."""
    pairs = [
        ("Network", facts["network"]),
        ("RankSize", facts["rank_size"]),
        ("BatchSize", facts["batch_size"]),
        ("DeviceType", facts["machine"]),
        ("Device", "{} ({})".format(facts["device"], facts["device_name"])),
        ("Data", facts["data"]),
        ("CaseName", case),
    ]
    if "fps" in result:
        pairs += [
            ("ActualFPS", "{:.2f}".format(result["fps"])),
            ("TrainingTime", "{:.2f}".format(1000 * result["step_seconds"])),
            ("ActualLoss", "{:.6g}".format(result["loss"])),
        ]
    if case.endswith("_acc"):
        pairs += [
            ("TrainAccuracy", "{:.3f}".format(result["acc1"])),
            ("TrainAccuracy5", "{:.3f}".format(result["acc5"])),
        ]
    pairs.append(("E2ETrainingTime", "{:.0f}".format(result["e2e_seconds"])))
    return ["{} = {}".format(*pair) for pair in pairs]


def write_results(folder, mode):
    """Write the result files of the run in `folder` and return the lines for the screen.

    Raises:
        IncompleteLog: the log has no end, or not what the mode needs.
    """
    logs = sorted(glob.glob(os.path.join(glob.escape(folder), "train_*.log")))
    if len(logs) != 1:
        raise IncompleteLog("{}: {} files train_<id>.log, not one".format(folder, len(logs)))
    facts, result = parse(logs[0])
    files = {}
    for kind in KINDS[mode]:
        needed = {"perf": "fps", "acc": "acc1"}[kind]
        if needed not in result:
            raise IncompleteLog("{}: the result has no {}".format(logs[0], needed))
        case = "{network}_bs{batch_size}_{rank_size}p_{kind}".format(kind=kind, **facts)
        files[case + ".log"] = result_lines(facts, result, case)
    if mode != "eval":
        step_losses = losses(os.path.join(folder, "metrics.jsonl"))
        files["train_{}_loss.txt".format(case)] = ["{:.8g}".format(loss) for loss in step_losses]
    for name, lines in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    screen = []
    if "fps" in result:
        screen.append("Final Performance images/sec : {:.2f}".format(result["fps"]))
    if "acc1" in result:
        screen.append("Final Train Accuracy : {:.3f}".format(result["acc1"]))
    return screen + ["E2E Training Duration sec : {:.0f}".format(result["e2e_seconds"])]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--mode", required=True, choices=sorted(KINDS))
    args = parser.parse_args(argv)
    try:
        print("\n".join(write_results(args.folder, args.mode)))
    except (IncompleteLog, OSError, ValueError) as error:
        print("[Error] {}".format(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
