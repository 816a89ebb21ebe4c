"""Functions that the bundles share by copy; `python tests/tools/copies.py --fix` renews those that are stale.

A copy stands under `# Copied from <file>:<name>`; one that differs on purpose under `# Differs from <bundle>: <why>`.
"""

import ast
import collections
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ("main.py", "models/pretrained.py")
MARK = re.compile(r"# (Copied|Differs) from ([^:]+)(?::\s*(.*))?$")
ORIGINAL = "MnasNet"  # the bundle that the others copy from
ALIKE_BY_NATURE = ("build_parser", "convert")  # every bundle has its own


class Definition:
    """A top-level function or class of a file, with the marker above it, if any."""

    def __init__(self, path, lines, node):
        self.path, self.name = path, node.name
        self.first, self.last = node.lineno - 1, node.end_lineno
        self.text = "\n".join(lines[self.first : self.last])
        marker = MARK.match(lines[self.first - 1]) if self.first else None
        self.kind, self.source, self.detail = marker.groups() if marker else (None, None, None)
        self.tree = ast.dump(_without_docstrings(node))


def _without_docstrings(node):
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return node


def definitions(root=ROOT):
    """Return every top-level `Definition` of the bundles' shared files."""
    found = []
    for name in FILES:
        for path in sorted(root.glob("*/" + name)):
            text = path.read_text(encoding="utf-8")
            nodes = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
            found += [Definition(path.relative_to(root), text.splitlines(), node) for node in nodes]
    return found


def problems(root=ROOT):
    """Return a line for each copy that is stale, points nowhere, or has a twin of the same name without a marker."""
    found, lines = definitions(root), []
    by_place = {"{}:{}".format(d.path.as_posix(), d.name): d for d in found}
    by_name = collections.defaultdict(list)
    for d in found:
        by_name[d.name, d.path.name].append(d)
    for place, d in sorted(by_place.items()):
        if d.kind == "Copied":
            original = by_place.get("{}:{}".format(d.source, d.detail))
            if original is None:
                lines.append("{} is a copy of {}:{}, which is not there".format(place, d.source, d.detail))
            elif original.kind == "Copied":
                lines.append("{} is a copy of a copy; name {}:{}".format(place, original.source, original.detail))
            elif original.tree != d.tree:
                lines.append("{} is not what {}:{} is any more".format(place, d.source, d.detail))
        elif d.kind is None and d.name not in ALIKE_BY_NATURE:
            others = [o for o in by_name[d.name, d.path.name] if o is not d]
            copied = [o for o in others if o.source and o.source.split("/")[0] == d.path.parts[0]]
            if others and not copied:
                lines.append("{} has a twin in {} and no marker".format(place, others[0].path))
    return lines


def fix(root=ROOT):
    """Rewrite every stale copy from its original; return the names of the copies."""
    renewed = []
    found = definitions(root)
    by_place = {"{}:{}".format(d.path.as_posix(), d.name): d for d in found}
    for d in sorted(found, key=lambda d: -d.first):  # from the end of each file, so that line numbers stay true
        original = by_place.get("{}:{}".format(d.source, d.detail)) if d.kind == "Copied" else None
        if original is not None and original.tree != d.tree:
            path = root / d.path
            lines = path.read_text(encoding="utf-8").splitlines()
            lines[d.first : d.last] = original.text.splitlines()
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            renewed.append("{}:{}".format(d.path, d.name))
    return renewed


if __name__ == "__main__":
    if sys.argv[1:] == ["--fix"]:
        print("\n".join(fix()) or "nothing to renew")
    sys.exit("\n".join(problems()) or 0)
