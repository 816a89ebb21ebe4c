"""Weights from files: read without running code in them, and any official checkpoint fitted to a network."""

import copy
import inspect
import pickle
import re
import types
import zipfile

import torch

from common.data import UNUSED, find_classes, first_of, has_split
from common.errors import UserError, printable

LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # of what torch.save wrote before it wrote zip files
WRAPPERS = ("state_dict", "model")  # names under which files keep the weights, beside other things


def read(path):
    """Return the dict that the file `path` holds, tensors on the CPU; no code in it runs.

    Raises:
        UserError: it cannot be read, is damaged, or holds more than tensors and plain values.
    """
    try:
        content = _read_safetensors(path) if path.endswith(".safetensors") else _read_torch(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError("{} cannot be read: {}".format(path, error.strerror or error)) from None
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        refused = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", str(error))
        if refused:
            text = "{} holds more than tensors and plain values ({}); it was not loaded"
            raise UserError(text.format(path, refused.group(1))) from None
        # What torch says before this would have the user load the file without `weights_only`.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
        raise UserError("{} is damaged or no checkpoint ({})".format(path, reason.splitlines()[0][:200])) from None
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
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_START))
    if start[:4] == b"PK\3\4":
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch.load compares no checksums. Files of torch.serialization.set_crc32_options(False) have none: all 0.
            damaged = any(entry.CRC for entry in entries) and archive.testzip()
        if damaged:
            raise UserError("{} is damaged: wrong checksum of {}".format(path, damaged))
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UserError("{} is a TorchScript archive, which is code; it was not loaded".format(path))
    elif start != LEGACY_START:
        raise ValueError("not a file of torch.save")
    if "weights_only" in inspect.signature(torch.load).parameters:
        return torch.load(path, map_location="cpu", weights_only=True)
    restricted = types.SimpleNamespace(__name__="restricted", Unpickler=_Unpickler, load=_unpickle)
    return torch.load(path, map_location="cpu", pickle_module=restricted)


class _Unpickler(pickle.Unpickler):
    """For a torch without `weights_only`: finds the few names that tensors, dicts and plain values are made of."""

    _NAMES = {"_codecs.encode", "collections.OrderedDict", "torch.Size", "torch.device"}
    _NAMES |= {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        if is_dtype or is_storage or "{}.{}".format(module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError("Unsupported global: GLOBAL {}.{}".format(module, name))


def _unpickle(file, **options):
    return _Unpickler(file, **options).load()


def _is_state_dict(value):
    return isinstance(value, dict) and len(value) > 0 and all(torch.is_tensor(item) for item in value.values())


def load(model, content, path, convert, may_replace_head, key=None):
    """Load any official checkpoint of the network into `model`; return lines that say what was done.

    Args:
        model: the model; its `classifier_keys` are the prefixes of the layers whose size is the number of classes.
        content: what `read(path)` returned.
        path: for messages.
        convert: the bundle's `models.pretrained.convert(state, model) -> (state, notes)`, which translates the keys of
            other sources and raises ValueError for another network.
        may_replace_head: whether a head of another number of classes is left as initialised (fine-tuning).
        key: name of the state dict in `content`, where it is not the usual one.

    Raises:
        UserError: the weights are of another network, or of another number of classes.
    """
    if key is not None and key not in content:
        raise UserError("{} has no {}".format(path, key))
    key = key or next((name for name in WRAPPERS if isinstance(content.get(name), dict)), None)
    state = content if key is None else content[key]
    if not _is_state_dict(state):
        raise UserError("{} holds no state dict".format(path))
    source = path if key is None else "{} of {}".format(key, path)
    others = [name for name in content if key is not None and name != key and _is_state_dict(content[name])]
    source += " (not {})".format(printable(", ".join(others))) if others else ""  # such as an average of the weights
    if all(name.startswith("module.") for name in state):
        state = {name[len("module.") :]: value for name, value in state.items()}
    try:
        state, notes = convert(dict(state), model)
    except ValueError as error:
        raise UserError("{} does not fit: {}".format(path, error)) from None
    head = tuple(prefix + "." for prefix in model.classifier_keys)
    wanted = model.state_dict()
    for key in [key for key in state if key in wanted and state[key].shape != wanted[key].shape]:
        if not key.startswith(head) or state[key].shape[1:] != wanted[key].shape[1:]:
            shapes = tuple(state[key].shape), tuple(wanted[key].shape)
            raise UserError("{} is of another network: {} is {}, not {}".format(path, key, *shapes))
        has, needs = state[key].shape[0], wanted[key].shape[0]
        if has == needs + 1 == 1001:
            state[key] = state[key][1:]
            notes.append("{}: dropped class 0 (background) of {}".format(key, has))
        elif may_replace_head:
            del state[key]
            notes.append("{}: {} classes in the file, {} here: starts fresh".format(key, has, needs))
        else:
            text = "{} has {} classes, the data set has {} (where there is none: --num-classes {})"
            raise UserError(text.format(path, has, needs, has))
    optional = head if may_replace_head else ()
    missing = [key for key in wanted if key not in state and not key.startswith(optional)]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in wanted]
    if missing or unknown:
        names = [printable(", ".join(keys[:3])) for keys in (missing, unknown)]
        text = "{} is of another network: {} weights are missing ({}), {} are unknown ({})"
        raise UserError(text.format(path, len(missing), names[0], len(unknown), names[1]))
    model.load_state_dict(dict(wanted, **state))
    return ["loaded {} of {} tensors from {}".format(len(state), len(wanted), source)] + notes


def on_cpu(value):
    """Return `value` with its tensors on the CPU: a file must open where there is no card of this kind."""
    if torch.is_tensor(value):
        return value.detach().cpu()
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, and with the versions that a model's state dict carries
        copied.update((key, on_cpu(item)) for key, item in value.items())
        return copied
    return type(value)(map(on_cpu, value)) if isinstance(value, (list, tuple)) else value


def classes_of(content, args):
    """Return the class names that an evaluation counts by: those of the checkpoint `content`; None: the folders'.

    Raises UserError where train/, if it is there, has other classes.
    """
    known = content.get("classes") if args.evaluate and content and not args.classes_by_position else None
    if known and has_split(args.data, "train"):
        folders, named = (
            find_classes(args.data, "train"),
            [name for i, name in enumerate(known) if name != UNUSED.format(i)],
        )
        if sorted(folders) != sorted(named):
            text = "the checkpoint has {} classes, the data set has {}, not of the same names ({}; {}); "
            text += "--classes-by-position matches them by alphabetical order"
            raise UserError(text.format(len(known), len(folders), first_of(known), first_of(folders)))
    return known


def class_names(args, content, *loaders):
    """Return the names of all outputs of the network: the class folders and, up to `--num-classes`, unused ones.

    They are the checkpoint's where it is measured or used. Raises UserError where there are more folders than outputs.
    """
    known, folders = (content or {}).get("classes"), []
    if loaders and not args.synthetic:
        folders = loaders[0].images.classes
    elif args.data and not known:
        folders = find_classes(args.data, "train")
    is_used = known and (args.evaluate or not loaders)
    count = len(known) if is_used else args.num_classes or len(folders) or 1000
    if count < len(folders):
        text = "the network has {} classes (--num-classes), {} has {} class folders"
        raise UserError(text.format(count, args.data, len(folders)))
    names = folders + [(UNUSED if folders else "{}").format(number) for number in range(len(folders), count)]
    if loaders and (args.evaluate or args.pretrained) and known and len(known) == len(names) and known != names:
        text = "[Warning] the classes of the checkpoint ({}) stand for others here, by their positions: {}"
        args.notices.append(text.format(first_of(known), first_of(names)))
    return known if is_used else names
