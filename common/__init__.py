"""What must happen before torch is imported: a package that is missing, or a torch_npu that would end the process."""

import ctypes
import os
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


def _read(package, name):
    spec = find_spec(package)  # does not import the package
    if spec is None or not spec.origin:
        return ""
    with open(os.path.join(os.path.dirname(spec.origin), name), encoding="utf-8") as file:
        return file.read()


def _find_npu_problem():
    """Return why torch_npu, which is installed, cannot work here, with the cure; None otherwise."""
    texts = _read("torch_npu", "version.py"), _read("torch", "version.py")
    npu, torch = (re.search(r"__version__ = ['\"](\d+\.\d+\.\d+)", text) for text in texts)
    if not npu or not torch:
        return None
    npu, torch = npu.group(1), torch.group(1)
    if npu != torch:
        return 'torch_npu {0} does not fit torch {1}: pip install "torch_npu=={1}.*"'.format(npu, torch)
    cuda = re.search(r"^cuda\b.*= ['\"]([\d.]+)", texts[1], re.MULTILINE)
    if cuda and "def _autoload" in _read("torch_npu", "__init__.py"):  # it registers operators twice: an abort
        text = "torch {0} is built for CUDA {1}, beside which torch_npu ends the process: pip install torch=={0} {2}"
        return text.format(torch, cuda.group(1), "--index-url https://download.pytorch.org/whl/cpu")
    try:
        ctypes.CDLL("libhccl.so")
    except OSError as error:
        return "torch_npu finds no CANN ({}): install its toolkit and kernels, then source set_env.sh".format(error)
    for name in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        folder = os.environ.get(name, "")
        if "ASCEND_HOME_PATH" in os.environ and not os.path.isdir(folder):
            return "{}={} is no folder: source the set_env.sh of the CANN that is installed".format(name, folder)
    return None


NPU_PROBLEM = None
if sys.argv[:1] != ["-m"]:  # python -m common.parse_log and common.pack use no card
    require("torch", "numpy", "PIL", "tqdm")
    NPU_PROBLEM = _find_npu_problem()
if NPU_PROBLEM or sys.argv[:1] == ["-m"]:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # no stack traces of connections that fail
if os.path.basename(sys.argv[0]) == "main.py":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor one of Ctrl-C while torch is imported
