"""Run commands on the fake cards, and look at what ran where."""

import json
import os
import shutil
import signal
import subprocess

from tests import helpers
from tests.helpers import BUNDLES, ROOT
from tests.npu import build_cann

NPU = ROOT / "tests" / "npu"
PYTHON = NPU / "build" / "venv" / "bin" / "python"
CANN = NPU / "build" / "cann"
CHIPS = ("Ascend910A", "Ascend910B3")  # the first generation, and Atlas A2
# Eight ranks of PNASNet take 20 GB of the host, which is the cards' memory here, and two tests run at once.
MOST_CARDS = {**dict.fromkeys(BUNDLES, 8), "PnasNet5Large": 2}


def quick_python(chip):
    """Return the Python of a host with this chip; tests/conftest.py has one that starts at once."""
    return str(PYTHON)


def problem():
    """Return why nothing can run on the emulated cards, or None."""
    built = CANN / "checksum"
    if PYTHON.exists() and built.exists() and built.read_text() == build_cann.checksum():
        return None
    missing = [tool for tool in ("gcc", "g++", "nm") if not shutil.which(tool)]
    if missing:
        return "{} is missing (apt-get install build-essential), then: bash tests/npu/build.sh".format(missing[0])
    return "the emulated NPU is not built, or from other sources: bash tests/npu/build.sh"


def environment(cann=True, **variables):
    """Return the environment of a host with cards, or with torch_npu alone; `variables` choose cards and faults."""
    result = {key: value for key, value in os.environ.items() if not key.startswith(("ASCEND_", "FAKE_NPU_", "HCCL_"))}
    if cann:
        command = ["bash", "-c", 'source "$0" && env -0', str(CANN / "set_env.sh")]
        lines = subprocess.run(command, env=result, check=True, stdout=subprocess.PIPE, universal_newlines=True).stdout
        result = dict(line.split("=", 1) for line in lines.split("\0") if line)
    result.update(variables, OMP_NUM_THREADS="1")
    if "PYTHON" not in variables:
        result["PYTHON"] = quick_python(variables.get("FAKE_NPU_SOC", CHIPS[1]))
    result["PYTHON_EXEC"] = result["PYTHON"]  # of the ranks
    return result


def run(command, timeout=900, cann=True, **variables):
    """Run `command`, a list; return the finished process with what it wrote in `stdout`. Nothing outlives it.

    Its Python has imported torch_npu before it begins (tests/tools/forked_python.py), unless `variables` have PYTHON.
    """
    variables = environment(cann, **variables)
    process = subprocess.Popen(
        [variables["PYTHON"] if word == PYTHON else str(word) for word in command],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + "\n(killed after {} seconds)".format(timeout)
    return subprocess.CompletedProcess(command, process.returncode, output)


def assert_fine(process):
    """Check that the command ended well, and that the fake was not asked for what it cannot do."""
    assert process.returncode == 0, process.stdout
    assert "is not emulated" not in process.stdout, process.stdout


def small(bundle):
    """Return the flags of a bundle's small network, of convolutions."""
    return [*helpers.small(bundle), *(["--arch", "smlpnet_tiny"] if bundle == "SPACH-SMLP" else [])]


def cards(ranks):
    """Return the flags that make main.py run on so many cards."""
    return ["--device=npu", "--device-list", ",".join(map(str, range(ranks)))]


def assert_all_on_the_cards(folder, ranks, steps, most_copies):
    """Check $FAKE_NPU_STATS: each rank computed forward and backward on its own card, and only there.

    Only log points and the start of DDP copy anything back to the host: a copy per step is computing on the CPU.
    """
    for rank in range(ranks):
        file = folder / "rank{}.json".format(rank)
        assert file.exists(), "rank {} computed nothing on a card".format(rank)
        numbers = json.loads(file.read_text())
        assert list(numbers["calls"]) == [str(rank)], "rank {} computed on cards {}".format(
            rank, list(numbers["calls"])
        )
        calls = numbers["calls"][str(rank)]
        layers = calls.get("convolution_backward", 0) / steps
        assert layers >= 10 and layers == int(layers), "{} convolutions in {} steps".format(layers * steps, steps)
        assert calls["convolution"] >= layers * steps
        assert sum(calls.get(name, 0) for name in ("add_", "_foreach_add_", "addcdiv_", "_foreach_addcdiv_")) >= steps
        copies = numbers["copies_to_host"]
        assert copies <= most_copies, "{} copies to the host, of up to {}".format(copies, numbers["largest_to_host"])
