"""Scripts here start their Python from a process that has imported torch already."""

import pytest

from tests.tools.forked_python import Server


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory):
    """The path of a `python` that starts at once."""
    server = Server(tmp_path_factory.mktemp("python"))
    yield server.path
    server.close()


@pytest.fixture(autouse=True)
def quick_start(forked_python, monkeypatch):
    """Have scripts use it, unless a test names another."""
    monkeypatch.setenv("PYTHON", forked_python)
