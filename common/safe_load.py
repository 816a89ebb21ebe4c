"""Reading checkpoint files: damage is noticed, and code in a file is refused, not run, with every version of torch."""

import inspect
import os
import pickle
import re
import types
import zipfile

import torch

from common.errors import UserError

_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # of what torch.save wrote before it wrote zip files
_REFUSED = "Unsupported global: GLOBAL {}.{}"
_ANY_REFUSED = re.compile(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)")  # by torch too


def read(path):
    """Return the dict that the file `path` holds, tensors on the CPU.

    Raises:
        UserError: no such file, damaged, or more than tensors and plain values.
    """
    if not os.path.isfile(path):
        raise UserError("no checkpoint at {}".format(path))
    try:
        content = _read_safetensors(path) if path.endswith(".safetensors") else _read_torch(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError("{} cannot be read: {}".format(path, error.strerror or error)) from None
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        refused = _ANY_REFUSED.search(str(error))
        if refused:
            raise UserError(
                "{} holds more than tensors and plain values ({}); it was not loaded".format(path, refused.group(1))
            ) from None
        # What torch says before this would have the user load the file without `weights_only`.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
        reason = reason.splitlines()[0][:200]
        raise UserError("{} is damaged or no checkpoint ({})".format(path, reason)) from None
    if not isinstance(content, dict):
        raise UserError("{} holds no state dict".format(path))
    return content


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError("{}: pip install safetensors to read it".format(path)) from None
    return load_file(path)


def _read_torch(path):
    _check_bytes(path)
    if "weights_only" in inspect.signature(torch.load).parameters:
        return torch.load(path, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", pickle_module=restricted_pickle)


def _check_bytes(path):
    """Raise where `path` is not a whole file of torch.save; torch.load itself compares no checksums."""
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY_START))
    if start[:4] == b"PK\3\4":
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged:
                raise UserError("{} is damaged: wrong checksum of {}".format(path, damaged))
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError("{} is a TorchScript archive, which is code; it was not loaded".format(path))
    elif start != _LEGACY_START:
        raise ValueError("not a file of torch.save")


class _RestrictedUnpickler(pickle.Unpickler):
    """Finds the few names that tensors, dicts and plain values are made of, and nothing else."""

    _NAMES = {
        "_codecs": ("encode",),  # how old pickles spell bytes
        "collections": ("OrderedDict",),
        "torch": ("Size", "device"),
        "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"),
        "torch.storage": ("TypedStorage", "UntypedStorage", "_TypedStorage", "_UntypedStorage"),
    }

    def find_class(self, module, name):
        if name in self._NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage")):
                return found
        raise pickle.UnpicklingError(_REFUSED.format(module, name))


def _restricted_load(file, **options):
    return _RestrictedUnpickler(file, **options).load()


# What torch.load takes as `pickle_module` where it has no `weights_only`.
restricted_pickle = types.SimpleNamespace(
    __name__="restricted_pickle", Unpickler=_RestrictedUnpickler, load=_restricted_load
)
