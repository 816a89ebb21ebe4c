"""What pyproject.toml says of the tiers of tests is so."""

import ast
import os
import re
import subprocess

import pytest

from tests.helpers import ROOT

TIERS = {"slow", "npu", "legacy"}
TESTS = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "build" not in path.parts)


def collected(*options):
    """Return the ids of the tests that pytest would run with `options`."""
    command = [os.environ["PYTHON"], "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", *options]
    text = subprocess.run(command, cwd=str(ROOT), stdout=subprocess.PIPE, check=True).stdout.decode()
    return {line.partition(":")[0] for line in text.splitlines() if ".py: " in line}


def test_the_markers_are_those_of_the_tiers(pytestconfig):
    own = [line for line in pytestconfig.getini("markers") if line.partition(":")[0] in TIERS]
    assert {line.partition(":")[0] for line in own} == TIERS and len(own) == len(TIERS)
    options = pytestconfig.getini("addopts")
    assert "--strict-markers" in options and options[options.index("-m") + 1] == "not slow and not legacy"


def test_the_default_tier_has_the_short_cases_of_npu_and_nothing_of_legacy():
    folders = {name.split("/")[1] for name in collected()}
    assert folders >= {"unit", "bundles", "models", "reliability", "npu", "tools"} and "legacy" not in folders


def test_legacy_is_a_tier_of_its_own():
    assert {name.split("/")[1] for name in collected("-m", "legacy and not slow", "tests/legacy")} == {"legacy"}


@pytest.mark.parametrize("path", TESTS, ids=[str(path.relative_to(ROOT)) for path in TESTS])
def test_no_test_file_imports_another_or_asks_the_environment_for_a_tier(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.rpartition(".")[2].startswith("test_") or name.endswith("conftest")]
    assert not re.search(r"environ.*\bLONG\b", text)
