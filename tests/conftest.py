"""Fixtures that many tests share, and how tests are spread over processes."""

import os
import re
import shutil

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: threads of tests side by side would wait for each other's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import helpers
from tests.npu import harness
from tests.tools import forked_python, sample_data

NOT_RUN = "not run: "  # begins the reason of a test whose tools are missing
# Files of tests that share results which take long to make: all in one process, or those of each bundle.
SHARING = (
    "bundles/test_training",
    "bundles/test_accumulation",
    "bundles/test_fine_tuning",
    "npu/test_ranks",
    "reliability/test_resume",
    "reliability/test_bad_files",
)
SHARING_BY_BUNDLE = ("bundles/test_runs", "legacy/test_legacy")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each process one test after the other, but those that share results together, unless --dist is given."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = nodeid.partition("::")[0][len("tests/") : -len(".py")]
            bundle = re.search("|".join(helpers.BUNDLES), nodeid) if name in SHARING_BY_BUNDLE else None
            return name + bundle.group() if bundle else name if name in SHARING else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """Mark the tests of a tier by their folder; skip those whose tools are missing, which `sessionfinish` counts."""
    problem = harness.problem()
    for item in items:
        folder = item.path.parent.name
        if folder in ("npu", "legacy"):
            item.add_marker(folder)
        if folder == "npu" and problem:
            item.add_marker(pytest.mark.skip(reason=NOT_RUN + problem))


def pytest_terminal_summary(terminalreporter):
    """Say in a line for each reason how many tests could not run."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    reasons = [reason.partition(NOT_RUN)[2] for reason in reasons if NOT_RUN in reason]
    for reason in sorted(set(reasons)):
        terminalreporter.write_line("[Error] {} tests were not run: {}".format(reasons.count(reason), reason))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """End with status 3 where all passed but some could not run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if exitstatus == 0 and any(NOT_RUN in report.longrepr[2] for report in skipped):
        session.exitstatus = 3


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits as an ImageFolder: 1497 training and 300 validation images."""
    folder = tmp_path_factory.mktemp("digits")
    sample_data.write(folder)
    return folder


@pytest.fixture(scope="session")
def few_digits(digits, tmp_path_factory):
    """Eight training and three validation images of each class."""
    folder = tmp_path_factory.mktemp("few_digits")
    for split, count in (("train", 8), ("val", 3)):
        for source in sorted((digits / split).iterdir()):
            target = folder / split / source.name
            target.mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                shutil.copy(image, target)
    return folder


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory):
    """The path of a `python` that starts at once."""
    server = forked_python.Server(tmp_path_factory.mktemp("python"))
    yield server.path
    server.close()


@pytest.fixture(scope="session")
def quick_npu_python(tmp_path_factory):
    """A function that returns the path of a `python` that has imported torch_npu already, on a host with this chip."""
    servers = {}

    def path(chip):
        if chip not in servers:
            environment = harness.environment(FAKE_NPU_SOC=chip, PYTHON="")
            servers[chip] = forked_python.Server(tmp_path_factory.mktemp("python"), harness.PYTHON, environment)
        return servers[chip].path

    yield path
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module", autouse=True)
def quick_start(request):
    """Have scripts, `main_py` and ranks start with these; a test of the start itself names another."""
    folder = request.path.parent.name
    with pytest.MonkeyPatch.context() as patch:
        if folder == "npu" and not harness.problem():
            patch.setattr(harness, "quick_python", request.getfixturevalue("quick_npu_python"))
        elif folder not in ("npu", "legacy", "benchmark"):
            for name in ("PYTHON", "PYTHON_EXEC"):  # for common/launch.sh, for torchrun
                patch.setenv(name, request.getfixturevalue("quick_python"))
        yield


@pytest.fixture
def bundle_copy(tmp_path):
    """`copy_bundle` to a folder with a space in its name."""
    return lambda bundle: helpers.copy_bundle(bundle, tmp_path / "a place")


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """Forty training and ten validation images of two classes."""
    return helpers.make_images(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="session")
def mnasnet():
    """A process that has imported MnasNet's main.py and forks runs of it."""
    server = helpers.Server("MnasNet")
    yield server
    server.close()
