"""common/ stays small: its files and lines, and what a training run loads of it."""

import subprocess

from tests.helpers import BUNDLES, ROOT

FILES, LINES, LINES_OF_ONE = 18, 3605, 320  # the aim is 2,500 lines


def lines(*patterns):
    """Return {file: number of its lines} of the tracked and new files that fit the git patterns."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=str(ROOT), stdout=subprocess.PIPE, check=True).stdout.decode().split("\n")
    return {name: len((ROOT / name).read_text().splitlines()) for name in names if name and (ROOT / name).is_file()}


def test_the_number_of_files_and_lines():
    common = lines("common")
    assert len(common) <= FILES, sorted(common)
    assert max(common.values()) <= LINES_OF_ONE, common
    assert sum(common.values()) <= LINES
    recipes = lines("*/main.py")
    assert all(150 <= count <= 320 for count in recipes.values()), recipes


def test_no_c_outside_the_emulated_card():
    sources = lines("*.c", "*.cpp", "*.cc", "*.h")
    assert [name for name in sources if not name.startswith("tests/npu/")] == []


def test_the_documents_stay_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 215 + len(BUNDLES)  # each has a row
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 70
