"""Pictures of runs: loss, Acc@1, learning rate and throughput, drawn with matplotlib where it is installed."""

import io
import logging
import os

from common import files
from common.results import progress

NAME = "curves.png"
POINTS = 500  # of a line: more of them hide each other
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def draw(runs, path):
    """Draw `runs`, a list of `results.Run`, over each other into the PNG file `path`, which is replaced whole.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its caches are no news
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=100)
    panels = figure.subplots(2, 2).flatten()
    in_steps = all(progress(run.train[-1]) < 1 for run in runs if run.train)
    for panel, title in zip(panels, ("loss", "Acc@1 in percent", "learning rate", "FPS (images per second)")):
        panel.set_title(title)
        panel.set_xlabel("step" if in_steps else "epochs done")
        panel.grid(alpha=0.3)
    for number, run in enumerate(runs):
        _draw_run(panels, run, COLORS[number % len(COLORS)], in_steps, is_alone=len(runs) == 1)
    for panel in panels[2:]:
        panel.margins(y=0.1)
        panel.set_ylim(bottom=0)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.07, top=0.92 - 0.025 * len(runs), hspace=0.3, wspace=0.15)
    if len(runs) == 1:
        figure.suptitle(_title(runs[0]))
        panels[1].legend(loc="lower right")
    else:
        panels[1].set_title("Acc@1 in percent (thick: val, thin: train)")
        lines = [panels[0].plot([], [], color=COLORS[i % len(COLORS)])[0] for i in range(len(runs))]
        figure.legend(lines, [_title(run) for run in runs], loc="upper center", frameon=False)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    os.replace(files.write_beside(path, data.getbuffer()), path)


def _title(run):
    trained = (run.epochs or "0") + ("" if "steps" in (run.epochs or "") else " epochs")
    return "   ".join([run.name, trained, run.facts.get("date", ""), run.folder])


def _draw_run(panels, run, color, in_steps, is_alone):
    """Add the lines of one run; validation accuracy stands out against that of the training."""

    def line(panel, key, records=run.train, **style):
        points = [
            (record["step"] if in_steps else progress(record), record[key]) for record in records if key in record
        ]
        panel.plot(*_thinned(points), **dict({"color": color, "linewidth": 1.5}, **style))

    loss, accuracy, rate, fps = panels
    line(loss, "loss")
    line(accuracy, "acc1", linewidth=1, alpha=0.6, label="train")
    ends = {record["epoch"]: record for record in run.train}  # where val/ was measured: after the epoch's last record
    measured = [dict(ends[record["epoch"]], acc1=record["acc1"]) for record in run.evals if record["epoch"] in ends]
    marker = "o" if len(measured) < 50 else None
    line(accuracy, "acc1", measured, color="tab:red" if is_alone else color, linewidth=2, marker=marker, label="val")
    line(rate, "lr")
    line(fps, "fps", run.train[1:] or run.train)  # the first steps set everything up


def _thinned(points):
    """Return (xs, ys) of `points`, neighbours averaged so that at most `POINTS` are left."""
    size = -(-len(points) // POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return tuple([sum(point[axis] for point in group) / len(group) for group in groups] for axis in (0, 1))
