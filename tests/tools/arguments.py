"""Tables in the bundles' READMEs that follow from the code; `python tests/tools/arguments.py --fix` renews them.

The tables of arguments come from `build_parser`, in the Chinese README through `data/arguments_zh.json`; the list of
public addresses from all files of the bundle and of common/. What lies outside the marks is never touched.
"""

import json
import pathlib
import re
import sys
from argparse import SUPPRESS

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.helpers import BUNDLES, imported  # noqa: E402

CHINESE = ROOT / "tests" / "data" / "arguments_zh.json"  # from English groups and meanings
BEGIN, END = "<!-- written by tests/tools/arguments.py -->\n", "<!-- end -->"
HEADS = {"README.md": ("option", "default", "meaning"), "README_zh.md": ("参数", "默认值", "说明")}
ADDRESS = re.compile(r"https?://[\w./~?#=&%+:-]*[\w/]|[\w.+-]+@[\w-]+\.[\w.-]+\w")


def _option(action):
    metavar = action.metavar or ("" if action.choices is None else "|".join(map(str, action.choices)))
    metavar = metavar or ("TEXT" if action.type is None else "X")
    words = "" if action.nargs == 0 else " [{}]".format(metavar) if action.nargs == "?" else " " + metavar
    *others, last = action.option_strings
    return ", ".join("`{}`".format(name) for name in [*others, last + words])


def _meaning(action):
    values = dict(vars(action), choices=", ".join(map(str, action.choices or ())))
    return action.help % values


def argument_tables(parser, heads, translate):
    """Return the text of one table per group of options; `translate` is applied to titles and meanings."""
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help" and action.help != SUPPRESS]
        if actions:
            lines += [
                "",
                "**{}**".format(translate(group.title)),
                "",
                "| {} | {} | {} |".format(*heads),
                "|---|---|---|",
            ]
        for action in actions:
            default = "" if action.default is None or action.nargs == 0 else "`{}`".format(action.default)
            cells = (_option(action), default, translate(_meaning(action)))
            lines.append("| {} | {} | {} |".format(*(cell.replace("|", "\\|") for cell in cells)))
    return "\n".join(lines[1:]) + "\n"


def address_table(bundle, root=ROOT):
    """Return the table of all public addresses in the files of `bundle` and of common/, and where they stand."""
    found = {}
    for path in sorted([*(root / bundle).rglob("*"), *(root / "common").rglob("*")]):
        inside = path.relative_to(root)
        hidden = {"output", "__pycache__", "public_address_statement.md"}.intersection(inside.parts)
        if path.suffix in (".py", ".sh", ".txt", ".md") and not hidden:
            for address in ADDRESS.findall(path.read_text(encoding="utf-8")):
                found.setdefault(address, set()).add(inside.as_posix())
    rows = ["| `{}` | {} |".format(address, ", ".join(sorted(files))) for address, files in sorted(found.items())]
    return "\n".join(["| 公网地址 address | 文件 files |", "|---|---|", *rows]) + "\n"


def tables(bundle):
    """Return {path: text between the marks} of the bundle's documents, as the code wants it."""
    chinese = json.loads(CHINESE.read_text(encoding="utf-8"))
    with imported(bundle, "main") as main:
        parser = main.build_parser()
    wanted = {"README.md": argument_tables(parser, HEADS["README.md"], str)}
    wanted["README_zh.md"] = argument_tables(parser, HEADS["README_zh.md"], lambda text: chinese.get(text, text))
    wanted["public_address_statement.md"] = address_table(bundle)
    return {ROOT / bundle / name: text for name, text in wanted.items()}


def with_table(document, table):
    """Return the text `document` with `table` between its marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("no marks {} ... {}".format(BEGIN.strip(), END))
    return before + begin + table + end + after


def stale(fix=False):
    """Return the documents whose tables are not what the code says; with `fix` they are renewed."""
    found = []
    for bundle in BUNDLES:
        for path, table in tables(bundle).items():
            old = path.read_text(encoding="utf-8")
            new = with_table(old, table)
            if new != old:
                found.append(path.relative_to(ROOT).as_posix())
                if fix:
                    path.write_text(new, encoding="utf-8")
    return found


if __name__ == "__main__":
    renew = sys.argv[1:] == ["--fix"]
    names = stale(renew)
    hint = "not up to date: {}; python tests/tools/arguments.py --fix".format(", ".join(names))
    sys.exit(0 if renew or not names else hint)
