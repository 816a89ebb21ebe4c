"""What the tests share: real digits to train on, and copies of bundles to run scripts in."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: threads of tests side by side would wait for each other's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import sample_data
from tests.bundles import ROOT

LONG = bool(os.environ.get("LONG"))  # the same assertions with the full numbers: tests/long.sh
# Files with results that take long to make and serve many tests: all tests of such a file run in one process.
SHARING = ["tests/test_{}.py".format(name) for name in ("bad_numbers", "npu_ranks", "resume", "training")]
collect_ignore = [] if "LEGACY" in os.environ else ["legacy"]  # tests/legacy.sh makes its environments


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each process one test after the other, but those of a `SHARING` file together, unless --dist is given."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            return path if path in SHARING else nodeid

    return Scheduling(config, log)


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


def copy_bundle(bundle, place):
    """Copy one bundle and common/ into the folder `place`; return the bundle's folder there."""
    ignored = shutil.ignore_patterns("output", "*.pth.tar*", "__pycache__")
    for name in ("common", bundle):
        if not (place / name).exists():
            shutil.copytree(str(ROOT / name), str(place / name), ignore=ignored)
    return place / bundle


@pytest.fixture
def bundle_copy(tmp_path):
    """`copy_bundle` to a folder with a space in its name."""
    return lambda bundle: copy_bundle(bundle, tmp_path / "a place")


def run(command, cwd=None, timeout=300, **environment):
    """Run `command`; return the finished process with its text in `stdout` and `stderr`."""
    variables = dict(os.environ, **dict({"PYTHON": sys.executable}, **environment))
    return subprocess.run(
        [str(word) for word in command],
        cwd=str(cwd or pathlib.Path.home()),
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=timeout,
    )


def run_script(bundle, name, *options, **kwargs):
    """Run test/train_<name>.sh of the bundle's folder `bundle`."""
    return run(["bash", bundle / "test" / "train_{}.sh".format(name), *options], **kwargs)


SMALL = {  # two images on a last map of 1x1 would leave BatchNorm two numbers, and gradients beyond all bounds
    "MnasNet": ["--arch", "mnasnet0_5", "--image-size", "64"],
    "SPNASNet_100": ["--image-size", "64"],
    "SPACH-SMLP": ["--image-size", "32"],
    "PnasNet5Large": ["--image-size", "64", "--aux-weight", "0"],
    "ShuffleNetV2": ["--arch", "shufflenet_v2_x0_5", "--image-size", "32"],
}


def small(bundle):
    """Return flags that make a bundle's network and images small enough for a test; any new bundle needs some."""
    return SMALL[bundle]


def assert_refused(process, status, *words):
    """Assert one clear line with `words`, the exit status, and nothing that looks like a result or a crash."""
    text = process.stdout + (process.stderr or "")
    assert process.returncode == status, text
    errors = [line for line in text.splitlines() if line.startswith("[Error]")]
    assert len(errors) == 1, text
    for word in words:
        assert word in errors[0]
    assert "Final" not in text
    assert "traceback" not in text.lower()  # "(traceback in FILE)" too: an error that nobody has foreseen


def result_file(bundle, kind, device_id=0):
    """Return the keys and values of the run's only ..._<kind>.log."""
    (path,) = (bundle / "test" / "output" / str(device_id)).glob("*_{}.log".format(kind))
    return dict(line.split(" = ", 1) for line in path.read_text().splitlines())


def loss_file(bundle, device_id=0):
    """Return the losses of the run's loss file."""
    (path,) = (bundle / "test" / "output" / str(device_id)).glob("train_*_loss.txt")
    return [float(line) for line in path.read_text().split()]
