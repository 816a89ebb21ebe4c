"""Tables of runs, as text, Markdown, CSV and JSON: one row for each run, or two runs side by side."""

import csv
import io
import json
import unicodedata

COLUMNS = (
    *("NAME", "Acc@1", "FPS", "Epochs", "AMP_Type", "Torch_version"),  # as in the READMEs of ModelZoo
    *("Device", "Batch", "Data", "Date", "State", "Folder"),
)
DIGITS = {"Acc@1": 3, "Acc@5": 3, "FPS": 2, "Loss": 4, "Seconds per step": 4, "Share of waiting for data": 3}
DIGITS.update({"Memory in GiB": 2, "Seconds in all": 1, "Ratio": 3})


def row(run):
    """Return the dict from `COLUMNS` to what `run`, a `results.Run`, has there: text, float or None."""
    facts = run.facts
    precision, batch = facts.get("precision", ""), facts.get("batch_size")
    values = (
        run.name,
        run.acc1,
        run.fps,
        run.epochs,
        "O0" if precision == "float32" else facts.get("opt_level"),
        facts.get("torch"),
        facts.get("device_name", facts.get("device")),
        batch and "{} x {}".format(batch, facts.get("rank_size", "?")),
        facts.get("data"),
        facts.get("date"),
        run.state if run.state != "failed" else "FAILED: " + run.reason,
        run.folder,
    )
    return dict(zip(COLUMNS, values))


def table(runs):
    """Return a list of rows, dicts of the same keys, one for each run."""
    return [row(run) for run in runs]


def comparison(a, b):
    """Return a list of rows with what two runs have: the table's columns, means over the run, differing arguments."""
    facts = [dict(row(run), **_means(run)) for run in (a, b)]
    rows = [_compared(name, *(fact[name] for fact in facts)) for name in facts[0]]
    arguments = [run.facts.get("args", {}) for run in (a, b)]
    for name in sorted(set(arguments[0]) | set(arguments[1])):
        values = [arguments[i].get(name) for i in (0, 1)]
        if values[0] != values[1]:
            rows.append(_compared("--" + name.replace("_", "-"), *values))
    return rows


def _compared(name, a, b):
    are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (a, b))
    ratio = b / a if are_numbers and a else None
    return {"": name, "A": _text(name, a), "B": _text(name, b), "Ratio": ratio}


def _means(run):
    """Return numbers that the table has no room for; None where a run (an old one, say) does not have them."""
    last = run.train[-1] if run.train else {}
    timed = [record for record in run.train if "step_seconds" in record]
    seconds = sum(record["step_seconds"] for record in timed)
    return {
        "Acc@5": max((record["acc5"] for record in run.evals if "acc5" in record), default=None),
        "Loss": last.get("loss"),
        "Seconds per step": seconds / len(timed) if timed else None,
        "Share of waiting for data": sum(record["data_seconds"] for record in timed) / seconds if seconds else None,
        "Memory in GiB": last.get("memory_gib"),
        "Skipped steps": last.get("skipped"),
        "Seconds in all": run.result.get("e2e_seconds"),
    }


def _text(name, value):
    if value is None:
        return "-"
    return "{:.{}f}".format(value, DIGITS[name]) if name in DIGITS else str(value)


def as_json(rows):
    """Return the rows as a JSON list of objects, numbers in full."""
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def as_csv(rows):
    """Return the rows as CSV with a header; what is not there is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else _text(name, value) for name, value in r.items()} for r in rows)
    return out.getvalue()


def _cells(rows):
    """Return the rows as lists of text, the header first."""
    return [list(rows[0])] + [[_text(*item) for item in r.items()] for r in rows]


def as_markdown(rows):
    """Return the rows as a Markdown table."""
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in _cells(rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| {} |\n".format(" | ".join(cells)) for cells in lines)


def as_text(rows):
    """Return the rows as aligned columns."""
    lines = _cells(rows)
    widths = [max(_width(cells[i]) for cells in lines) for i in range(len(lines[0]))]
    padded = ["  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(cells, widths)) for cells in lines]
    return "".join(line.rstrip() + "\n" for line in padded)


def _width(text):
    """Return how many columns of a terminal `text` takes; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


FORMATS = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "json": as_json}
