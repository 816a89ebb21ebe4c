"""What must happen before torch is imported: a package that is missing, or a torch_npu that would end the process."""

import ctypes
import os
import pathlib
import re
import signal
import sys
from importlib.util import find_spec


def require(*packages):
    """End the process with one line that says how to install the first of `packages` that is missing."""
    for name in packages:
        if find_spec(name) is None:
            file = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "requirements.txt")
            sys.exit("[Error] {} is missing for {}: pip install -r {}".format(name, sys.executable, file))


def _find(package, name, pattern):
    """Return what `pattern` finds in the file `name` of a package, which is not imported; None: nothing."""
    spec = find_spec(package)
    text = pathlib.Path(spec.origin).with_name(name).read_text(encoding="utf-8") if spec and spec.origin else ""
    found = re.search(pattern, text, re.MULTILINE)
    return found and found.group(1)


def _find_npu_problem():
    """Return why torch_npu, which is installed, cannot work here, with the cure; None otherwise."""
    npu, torch = (_find(name, "version.py", r"^__version__ = ['\"](\d+\.\d+\.\d+)") for name in ("torch_npu", "torch"))
    if not npu or not torch:
        return None
    if npu != torch:
        return 'torch_npu {0} does not fit torch {1}: pip install "torch_npu=={1}.*"'.format(npu, torch)
    cuda = _find("torch", "version.py", r"^cuda\b.*= ['\"]([\d.]+)")
    if cuda and _find("torch_npu", "__init__.py", "(def _autoload)"):  # it registers operators twice: an abort
        text = "torch {0} is built for CUDA {1}, beside which torch_npu ends the process: pip install torch=={0} {2}"
        return text.format(torch, cuda, "--index-url https://download.pytorch.org/whl/cpu")
    try:
        for name in ("hccl", "ascendcl", "acl_op_compiler", "ge_runner", "graph"):  # what torch_npu is linked to
            ctypes.CDLL("lib{}.so".format(name))
    except OSError as error:
        text = "torch_npu finds no CANN ({}): install its toolkit and kernels, then source set_env.sh"
        if "libascend_hal" in str(error):
            text = "torch_npu finds no driver ({}): pass its folder into the container, and name it in LD_LIBRARY_PATH"
        return text.format(error)
    for name in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        folder = os.environ.get(name, "")
        if "ASCEND_HOME_PATH" in os.environ and not os.path.isdir(folder):
            return "{}={} is no folder: source the set_env.sh of the CANN that is installed".format(name, folder)
    return None


IS_TOOL = sys.argv[:1] == ["-m"]  # python -m common.parse_log and common.pack use no card
if not IS_TOOL:
    require("torch", "numpy", "PIL", "tqdm")
NPU_PROBLEM = None if IS_TOOL else _find_npu_problem()
if NPU_PROBLEM or IS_TOOL:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # no stack traces of connections that fail
if IS_TOOL or os.path.basename(sys.argv[0]) == "main.py":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor one of Ctrl-C while torch is imported
    for stream in ("stdin", "stdout", "stderr"):  # a file of the run would take the place of one that is closed
        setattr(sys, stream, getattr(sys, stream) or open(os.devnull, "r+"))
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the locale cannot write ends no training
