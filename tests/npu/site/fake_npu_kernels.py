"""Loaded by torch as a backend, like torch_npu: gives the fake card its operators as soon as torch_npu is there."""

import atexit
import ctypes
import os


def install():
    import torch_npu  # noqa: F401

    library = ctypes.CDLL(os.path.join(os.environ["ASCEND_HOME_PATH"], "lib64", "libfake_kernels.so"))
    library.install()
    atexit.register(library.write_statistics)
