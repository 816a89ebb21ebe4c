"""The results tool: a table of runs, two runs side by side, their curves; and the result files of a finished run.

    python -m common.parse_log                                    all runs of all bundles
    python -m common.parse_log MnasNet --format markdown          those of one bundle; also text, csv, json
    python -m common.parse_log --compare MnasNet/test/output/0 MnasNet/test/output/0.prev-20260101-120000
    python -m common.parse_log MnasNet SPACH-SMLP --plot curves.png

A PATH is the output folder of a run, or a folder above such folders. Logs of the old ModelZoo scripts are read too.
"""

import argparse
import os
import signal
import sys

from common import curves, errors, results, tables
from common.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KINDS = {"full": ("perf", "acc"), "performance": ("perf",), "eval": ("acc",), "finetune": ("perf", "acc")}


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
    """Write ModelZoo's result files of the run in `folder`, and return the lines for the screen.

    Raises:
        UserError: the run has no end, or not what the mode needs.
    """
    run = results.read(folder)
    facts, result = run.facts, run.result
    if run.state != "complete":
        raise UserError("{}: the run did not reach its end ({})".format(folder, run.reason or run.state))
    contents = {}
    for kind in KINDS[mode]:
        needed = {"perf": "fps", "acc": "acc1"}[kind]
        if needed not in result:
            raise UserError("{}: the result has no {}".format(folder, needed))
        case = "{network}_bs{batch_size}_{rank_size}p_{kind}".format(kind=kind, **facts)
        contents[case + ".log"] = result_lines(facts, result, case)
    if mode != "eval":
        losses = [loss for record in run.train for loss in record["losses"]]
        contents["train_{}_loss.txt".format(case)] = ["{:.8g}".format(loss) for loss in losses]
    for name, lines in contents.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    screen = []
    if "fps" in result:
        screen.append("Final Performance images/sec : {:.2f}".format(result["fps"]))
    if "acc1" in result:
        screen.append("Final Train Accuracy : {:.3f}".format(result["acc1"]))
    return screen + ["E2E Training Duration sec : {:.0f}".format(result["e2e_seconds"])]


def find_runs(paths):
    """Return the runs at or below `paths`, a list of `results.Run`, each once.

    Raises:
        UserError: there is no run at one of them.
    """
    folders = []
    for path in paths:
        found = results.find(path)
        if not found:
            raise UserError("{}: no run there, and none below as test/output/<id>".format(path))
        found = [min(folder, os.path.relpath(folder), key=len) for folder in found]
        folders += [folder for folder in found if folder not in folders]
    return [results.read(folder) for folder in folders]


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m common.parse_log", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="default: all runs of this repository")
    parser.add_argument("--format", default="text", choices=sorted(tables.FORMATS), help="default: text")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs side by side, with ratios")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the curves of all runs over each other")
    parser.add_argument("--mode", choices=sorted(KINDS), help="write the result files of the run at PATH (launch.sh)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` is no error
    if args.mode:
        if len(args.paths) != 1:
            raise UserError("--mode needs the PATH of one run")
        print("\n".join(write_results(args.paths[0], args.mode)))
        return
    runs = find_runs(args.compare or args.paths or [ROOT])
    if args.compare and len(runs) != 2:
        raise UserError("--compare needs two runs, there are {}: name their output folders".format(len(runs)))
    table = tables.comparison(*runs) if args.compare else tables.table(runs)
    sys.stdout.write(tables.FORMATS[args.format](table))
    if args.plot:
        try:
            curves.draw(runs, args.plot)
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from None


if __name__ == "__main__":
    sys.exit(errors.run(main))
