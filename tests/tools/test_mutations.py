"""What `mutations.py` breaks is found by the test that it names."""

import shutil
import subprocess
import sys

import pytest

from tests.helpers import BUNDLES, ROOT
from tests.tools.mutations import MUTATIONS

IDS = [mutation.promise for mutation in MUTATIONS]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=IDS)
def test_a_mutation_still_applies(mutation):
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    found = text.count(mutation.old)
    assert found == 1, "tests/tools/mutations.py, {!r}: {} has its text {} times, not once: {}".format(
        mutation.promise, mutation.file, found, mutation.old
    )
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    file, _, name = mutation.test.partition("::")
    assert "def {}(".format(name.partition("[")[0]) in (ROOT / file).read_text(encoding="utf-8"), mutation.test


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=IDS)
def test_a_mutation_is_found(mutation, tmp_path):
    ignored = shutil.ignore_patterns("output", "build", "*.pth.tar*", "__pycache__")
    for name in ("common", "tests", *BUNDLES):
        shutil.copytree(str(ROOT / name), str(tmp_path / name), ignore=ignored)
    if (ROOT / "tests" / "npu" / "build").exists():
        (tmp_path / "tests" / "npu" / "build").symlink_to((ROOT / "tests" / "npu" / "build").resolve())
    shutil.copy(str(ROOT / "pyproject.toml"), str(tmp_path))
    path = tmp_path / mutation.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", mutation.test]
    process = subprocess.run(command, cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800)
    text = process.stdout.decode(errors="replace")
    assert process.returncode == 1 and " failed" in text, "not found:\n" + text
    assert " error" not in text.splitlines()[-1], "the test itself could not run:\n" + text
