"""Every flag of every program and the recipe of every script; `python tests/tools/command_lines.py --fix` renews them.

They stand in tests/data/command_lines.txt, so that none changes or goes without being seen.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.helpers import BUNDLES, imported  # noqa: E402

FILE = ROOT / "tests" / "data" / "command_lines.txt"


def _of_program(bundle):
    with imported(bundle, "main") as main:
        actions = main.build_parser()._actions
    for action in actions:
        if action.choices is not None:
            values = " " + "|".join(map(str, action.choices))
        else:
            values = "" if action.nargs == 0 else " " + (action.metavar or "X")
        default = "" if action.default is None or action.nargs == 0 else "  (default: {})".format(action.default)
        yield "{}/main.py  {}{}{}".format(bundle, ", ".join(action.option_strings), values, default)


def _of_scripts(bundle):
    for path in sorted((ROOT / bundle / "test").glob("*.sh")):
        lines = [line.strip(" \\") for line in path.read_text().splitlines() if line.startswith("    --")]
        yield "{}/test/{}  {}".format(bundle, path.name, " ".join(lines))


def command_lines():
    """Return them, one a line."""
    lines = [line for bundle in BUNDLES for of in (_of_program, _of_scripts) for line in of(bundle)]
    script = ROOT / BUNDLES[0] / "test" / "train_full_1p.sh"
    text = subprocess.run(["bash", str(script), "--help"], stdout=subprocess.PIPE, check=True).stdout.decode()
    options = re.findall(r"^ *(--[a-z_-]+(?:=\S+)?)", text.partition("flags of the recipe")[0], re.MULTILINE)
    lines += ["all scripts  " + option for option in options]
    for module in ("pack", "parse_log"):
        words = [sys.executable, "-m", "common." + module, "--help"]
        text = subprocess.run(words, cwd=str(ROOT), stdout=subprocess.PIPE, check=True).stdout.decode()
        options = re.findall(r"^  ((?:-\w, )?--[a-z][\w-]*(?: [A-Z]+| \{[^}]*\})?)", text, re.MULTILINE)
        lines += ["python -m common.{}  {}".format(module, option) for option in options]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--fix"]:
        FILE.write_text(command_lines(), encoding="utf-8")
    sys.exit(command_lines() != FILE.read_text(encoding="utf-8") and "not what the code says; --fix renews it")
