"""What the five bundles share: devices and ranks, feeding the device, checkpoints, log lines, the launcher.

Import it before torch: a torch_npu that cannot work would end the process inside `import torch`.
"""

import ctypes
import os
import re
import sys
from importlib.util import find_spec


def _name_missing_package(kind, error, traceback):
    """Show a package that is not installed as one line, and everything else as Python does."""
    if kind is not ModuleNotFoundError or not error.name:
        sys.__excepthook__(kind, error, traceback)
        return
    bundle = os.path.dirname(os.path.abspath(sys.argv[0]))
    file = os.path.join(bundle, "requirements.txt")
    file = file if os.path.isfile(file) else "BUNDLE/requirements.txt"
    text = "[Error] {} is missing for {}: pip install -r {}"
    print(text.format(error.name.partition(".")[0], sys.executable, file), file=sys.stderr)


sys.excepthook = _name_missing_package


def _read(package, name):
    spec = find_spec(package)
    if spec is None or not spec.origin:
        return None
    with open(os.path.join(os.path.dirname(spec.origin), name), encoding="utf-8") as file:
        return file.read()


def _find_npu_problem():
    """Return why torch_npu, which is installed, cannot work here, with the cure; None otherwise."""
    npu_text = _read("torch_npu", "version.py")
    torch_text = _read("torch", "version.py")
    if npu_text is None or torch_text is None:
        return None
    npu_version, torch_version = (re.search(r"__version__ = ['\"](\d+\.\d+\.\d+)", x) for x in (npu_text, torch_text))
    if npu_version and torch_version and npu_version.group(1) != torch_version.group(1):
        return 'torch_npu {0} does not fit torch {1}: pip install "torch_npu=={1}.*"'.format(
            npu_version.group(1), torch_version.group(1)
        )
    cuda = re.search(r"^cuda\b.*= ['\"]([\d.]+)", torch_text, re.MULTILINE)
    # Those that torch loads by itself register a second time what the CUDA build has registered: an abort.
    if cuda and "def _autoload" in _read("torch_npu", "__init__.py"):
        return (
            "torch {0} is built for CUDA {1}, beside which torch_npu ends the process: "
            "pip install torch=={0} --index-url https://download.pytorch.org/whl/cpu".format(
                torch_version.group(1), cuda.group(1)
            )
        )
    try:
        ctypes.CDLL("libhccl.so")
    except OSError as error:
        return (
            "torch_npu finds no CANN ({}): install CANN's toolkit and kernels, then source "
            "/usr/local/Ascend/cann/set_env.sh (older: /usr/local/Ascend/ascend-toolkit/set_env.sh)".format(error)
        )
    for name in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        folder = os.environ.get(name, "")
        if "ASCEND_HOME_PATH" in os.environ and not os.path.isdir(folder):
            return "{}={} is no folder: source the set_env.sh of the CANN that is installed".format(name, folder)
    return None


NPU_PROBLEM = _find_npu_problem()
if NPU_PROBLEM:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
