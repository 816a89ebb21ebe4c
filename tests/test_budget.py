"""common/ stays small: its files and lines, and what a training run loads of it."""

import subprocess
import sys

import pytest

from tests.bundles import BUNDLES, ROOT
from tests.conftest import run, small

FILES, LINES, LINES_OF_ONE = 18, 3420, 320  # on the way to 2,500 lines: never more than before
MODULES = 15  # of common/ that a training run loads
WATCHED = """
import sys
sys.argv = ["main.py", *sys.argv[1:]]
sys.path.insert(0, {bundle!r})
import main
status = main.main(sys.argv[1:])
print("LOADED", *sorted(name for name in sys.modules if name.split(".")[0] == "common"))
sys.exit(status or 0)
"""


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


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_training_run_loads_few_modules(bundle, few_digits, tmp_path):
    flags = ["--data", few_digits, "--max-steps=1", "-b", "4", "--workers=0", "--device=cpu", "--output-dir", tmp_path]
    code = WATCHED.format(bundle=str(ROOT / bundle))
    process = run([sys.executable, "-c", code, *flags, "--log-dir", tmp_path, *small(bundle)])
    assert process.returncode == 0, process.stdout + process.stderr
    (loaded,) = [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("LOADED")]
    assert len(loaded) <= MODULES, loaded
    assert not {"common.export", "common.pack"} & set(loaded)


def test_the_documents_stay_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 70
