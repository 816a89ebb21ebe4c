"""C files of this folder, compiled at first use by the machine's own compiler and kept in the user's cache."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile

import torch

from common.files import cache_folder

_OPTIONS = ["-O3", "-march=native", "-shared", "-fPIC"]


@functools.lru_cache(maxsize=None)
def library(name, *options):
    """Return `name`.c as a ctypes.CDLL, compiled with `options` for this processor, or None where that fails.

    The compiler is `cc`, or what the environment variable CC names.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".c")
    try:
        with open(source, "rb") as text, open("/proc/cpuinfo", "rb") as processor:
            features = next((line for line in processor if line.startswith((b"flags", b"Features"))), b"")
            key = text.read() + features + " ".join(options).encode()  # a home may serve several machines
        path = os.path.join(cache_folder(), "{}-{}.so".format(name, hashlib.sha256(key).hexdigest()[:16]))
        if not os.path.exists(path):
            os.makedirs(cache_folder(), exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
                part = os.path.join(folder, "part.so")
                command = [compiler, *_OPTIONS, source, "-o", part, *options]
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=60)
                os.replace(part, path)
        return ctypes.CDLL(path)
    except (OSError, subprocess.SubprocessError):
        return None


def call(function, tensors, *numbers):
    """Call a function of a `library` with the memory of `tensors`, then `numbers`, then the number of threads.

    Raises:
        MemoryError: it says so, by a result that is not 0.
    """
    kinds = {float: ctypes.c_float, int: ctypes.c_long}
    arguments = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments += [kinds[type(number)](number) for number in numbers]
    if function(*arguments, ctypes.c_long(torch.get_num_threads())):
        raise MemoryError(function.__name__)
