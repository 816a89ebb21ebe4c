"""Find the bundles, and import one of them without mixing the packages called `models` and modules called `main`."""

import contextlib
import importlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLES = sorted(path.parent.name for path in ROOT.glob("*/main.py"))


def _purge():
    for name in list(sys.modules):
        if name.split(".")[0] in ("models", "main"):
            del sys.modules[name]


@contextlib.contextmanager
def imported(bundle, module="models"):
    """Yield `module` of the folder `bundle`; nothing of the bundle stays importable afterwards."""
    folder = str(ROOT / bundle)
    _purge()
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module(module)
    finally:
        sys.path.remove(folder)
        _purge()
