"""Weights: read from files without running code in them, fitted to a network, trained in part; weights of classes."""

import inspect
import os
import pickle
import re
import types
import zipfile
from urllib.parse import urlsplit

import torch
from torch import nn

from common.data import UNUSED, find_classes, has_split
from common.errors import UserError, first_of

LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # of what torch.save wrote before it wrote zip files
HARMLESS = re.compile(  # what tensors, dicts and plain values are made of
    r"_codecs\.encode|collections\.OrderedDict|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.(Size|device|bool|(u?int|b?float|complex)\d+|(storage\.)?\w*Storage)"
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def download(address):
    """Return the path of a copy of the file at `address`, made once, in the folder of torch.hub.

    Its sha256 begins as the address says, https://.../x.pth#sha256=HEX or an official name: mnasnet1_3-a4c69d6f.pth.
    Raises UserError where it does not, where the address does not say, and where there is no such file.
    """
    url, _, digits = address.partition("#sha256=")
    name = os.path.basename(urlsplit(url).path)
    digits = digits.lower() or "".join(re.findall(r"-([0-9a-f]{8,64})\.[a-z.]+$", name))
    if not re.match("[0-9a-f]{8,64}$", digits):
        raise UserError("{}: add #sha256=HEX, the sum that the file must have".format(address))
    cache = torch.hub.get_dir() if hasattr(torch.hub, "get_dir") else os.path.expanduser("~/.cache/torch/hub")
    path = os.path.join(cache, "checkpoints", digits + "-" + name)
    if not os.path.isfile(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, digits)
        except (OSError, RuntimeError, ValueError) as error:  # no connection, another sum, no such address
            raise UserError("{} cannot be had: {}".format(address, error)) from None
    return path


def read(path):
    """Return the dict that the file `path` holds, tensors on the CPU; no code in it runs.

    Raises UserError where it cannot be read, is damaged, or holds more than tensors and plain values.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        content = _read_torch(path)
    except ImportError:
        raise UserError("{}: pip install safetensors to read it".format(path)) from None
    except OSError as error:
        raise UserError("{} cannot be read: {}".format(path, error.strerror or error)) from None
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        # What torch says before this would have the user load the file without `weights_only`.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
        text = "{} is damaged or no checkpoint ({})"
        refused = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", reason)
        if refused:
            text, reason = "{} holds more than tensors and plain values ({}); it was not loaded", refused.group(1)
        raise UserError(text.format(path, reason.splitlines()[0][:200])) from None
    if not isinstance(content, dict):
        raise UserError("{} holds no state dict".format(path))
    return content


def _read_torch(path):
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_START))
    if start[:4] == b"PK\3\4":
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch.load compares no checksums. Files of torch.serialization.set_crc32_options(False) have none: all 0.
            damaged = any(entry.CRC for entry in entries) and archive.testzip()
        if damaged:
            raise ValueError("wrong checksum of " + damaged)
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("a TorchScript archive, which is code")
    elif start != LEGACY_START:
        raise ValueError("not a file of torch.save")
    if "weights_only" in inspect.signature(torch.load).parameters:
        return torch.load(path, map_location="cpu", weights_only=True)
    restricted = types.SimpleNamespace(__name__="restricted", Unpickler=_Unpickler)
    restricted.load = lambda file, **options: _Unpickler(file, **options).load()
    return torch.load(path, map_location="cpu", pickle_module=restricted)


class _Unpickler(pickle.Unpickler):
    """For a torch without `weights_only`: finds nothing but what is `HARMLESS`."""

    def find_class(self, module, name):
        if HARMLESS.fullmatch("{}.{}".format(module, name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError("Unsupported global: GLOBAL {}.{}".format(module, name))


def load(model, content, path, convert, may_replace_head, key=None):
    """Load `content`, which `read(path)` returned, into `model`; return lines that say what was done.

    The weights are its `key`, "state_dict" or "model", or all of it; `convert(state, model)`, which returns (state,
    notes), knows the official ones. The layers `model.classifier_keys` have a row per class: where the file has other
    classes they start fresh, with `may_replace_head` (fine-tuning). Raises UserError where something does not fit.
    """
    found = {None: content, **content}  # None: the file is the state dict
    found = {k: v for k, v in found.items() if isinstance(v, dict) and v and all(map(torch.is_tensor, v.values()))}
    key = key or next((name for name in ("state_dict", "model") if name in found), None)
    if key not in found:
        raise UserError("{} holds no {}".format(path, key or "state dict"))
    state = found.pop(key)
    try:
        state, notes = convert({re.sub(r"^module\.", "", name): value for name, value in state.items()}, model)
        own, heads, fresh = model.state_dict(), tuple(prefix + "." for prefix in model.classifier_keys), []
        for name in [name for name in own if name.startswith(heads)]:
            has, needs = len(state.get(name, ())), len(own[name])
            if has == needs + 1 == 1001:
                state[name] = state[name][1:]
                notes.append("{}: dropped class 0 (background) of {}".format(name, has))
            elif has != needs:
                state[name] = own[name]
                fresh.append((name, has, needs))
        model.load_state_dict(state)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:  # torch's text has a line for each difference
        raise UserError("{} is of another network: {}".format(path, " ".join(str(error).split())[:300])) from None
    for name, has, needs in fresh:
        if not may_replace_head:
            text = "{} has {} classes, the data set has {} (where there is none: --num-classes {})"
            raise UserError(text.format(path, has, needs, has))
        notes.append("{}: {} classes in the file, {} here: starts fresh".format(name, has, needs))
    source = "{} of {}".format(key, path) if key else path
    others = " (not {})".format(", ".join(found)) if found else ""  # such as an average of the weights
    return ["loaded {} of {} tensors from {}{}".format(len(state) - len(fresh), len(own), source, others), *notes]


def on_cpu(value):
    """Return `value` with its tensors on the CPU: a file must open where there is no card of this kind."""
    if torch.is_tensor(value):
        return value.detach().cpu()
    if isinstance(value, dict):
        return type(value)((key, on_cpu(item)) for key, item in value.items())
    return type(value)(map(on_cpu, value)) if isinstance(value, (list, tuple)) else value


def classes_of(content, args):
    """Return the class names of the checkpoint that is evaluated, or None; raises UserError where train/ has others."""
    known = content.get("classes") if args.evaluate and content and not args.classes_by_position else None
    if known and has_split(args.data, "train"):
        folders = find_classes(args.data, "train")
        if set(folders) != {name for i, name in enumerate(known) if name != UNUSED.format(i)}:
            text = "the checkpoint has {} classes, the data set has {} ({}; {}): --classes-by-position ignores names"
            raise UserError(text.format(len(known), len(folders), first_of(known), first_of(folders)))
    return known


def class_names(args, content, loader=None):
    """Return the names of all outputs: the checkpoint's, or, in a training, the folders and unused ones behind them.

    Raises UserError where there are more folders than outputs.
    """
    known, folders = (content or {}).get("classes"), []
    if known and loader is None:
        return known
    if not args.synthetic and (loader or args.data):
        folders = loader.images.classes if loader else find_classes(args.data, "train")
    count = len(known) if known and args.evaluate else args.num_classes or len(folders) or 1000
    if count < len(folders):
        text = "the network has {} classes (--num-classes), {} has {} class folders"
        raise UserError(text.format(count, args.data, len(folders)))
    names = folders + [(UNUSED if folders else "{}").format(number) for number in range(len(folders), count)]
    if known and len(known) == len(names) and known != names:
        text = "[Warning] the classes of the checkpoint ({}) stand for others here, by their positions: {}"
        args.notices.append(text.format(first_of(known), first_of(names)))
    return known if known and args.evaluate else names


def train_only(args, model, log):
    """Have only those parameters of `model` trained that `--train-only` names, and say how many they are."""
    if args.train_only is None or args.evaluate:
        return
    parts = list(model.classifier_keys)
    if "norm" in args.train_only:
        parts += [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.rpartition(".")[0] in parts
    counts = [[p.numel(), p.numel() * p.requires_grad] for p in model.parameters()]
    text = "--train-only {}: {} of {} parameters are trained"
    log.line(text.format(args.train_only, sum(n for _, n in counts), sum(n for n, _ in counts)))


def set_training(model):
    """Put `model` into training mode, without BatchNorm layers that are not trained: their statistics stay."""
    model.train()
    for module in model.modules():
        if isinstance(module, NORMS) and not module.weight.requires_grad:
            module.eval()


def class_weights(args, loader, num_classes, card):
    """Return weights of the classes, float32 [num_classes] on the card, for `--class-weights`; else None.

    Each class of `loader`, the training's, counts as much as any other; the mean over its images is 1.
    """
    if args.class_weights is None:
        return None
    images = torch.bincount(torch.from_numpy(loader.images.targets), minlength=num_classes)
    return (len(loader) / ((images > 0).sum() * images.clamp(min=1).float())).to(card.torch_device)


def log_probabilities(logits, targets, class_weights):
    """Return float32 log-probabilities [B, C], each row times the weight of its target's class, unless that is None.

    A mean over the images then weighs them; it does not depend on how ranks share them, as torch's weighted mean does.
    """
    result = nn.functional.log_softmax(logits.float(), dim=1)
    return result if class_weights is None else result * class_weights[targets].unsqueeze(1)
