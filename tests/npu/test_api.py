"""Every name of torch.npu and torch_npu that this repository uses exists, with the signature that is used.

tests/npu/names.json holds the public names of the oldest 2.x wheel that is supported and of the newest one, with the
signatures of their Python functions; they were read from the wheels' sources. The newest is also asked itself.
"""

import ast
import json

from tests.helpers import BUNDLES, ROOT
from tests.npu.harness import NPU, PYTHON, assert_fine, run

NAMES = json.loads((NPU / "names.json").read_text())
NEWEST = "2.13.0"
# How `torch.npu` is called where the code does not write it out.
ALIASES = dict.fromkeys(["backend", "self.module", "card.module", "self._card.module"], "torch.npu")
# Constructed by getattr, with the keywords that the bundles give.
FUSED = {
    "torch_npu.optim.NpuFusedSGD": {"lr", "momentum", "weight_decay", "nesterov"},
    "torch_npu.optim.NpuFusedAdamW": {"lr", "betas", "weight_decay"},
}


def dotted(node):
    """Return "a.b.c" of an expression of that form, an alias replaced, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
        text = ast.unparse(node)
        if text in ALIASES:
            return ".".join([ALIASES[text], *reversed(parts)])
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def uses():
    """Yield (file, name, keywords or None, number of positional arguments, whether `hasattr` asks for it first)."""
    for path in sorted([*ROOT.glob("common/*.py"), *(p for bundle in BUNDLES for p in (ROOT / bundle).rglob("*.py"))]):
        tree = ast.parse(path.read_text())
        called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        guarded = set()
        for call in called.values():
            if isinstance(call.func, ast.Name) and call.func.id == "hasattr" and isinstance(call.args[1], ast.Constant):
                place = ast.unparse(call.args[0])
                guarded.add("{}.{}".format(ALIASES.get(place, place), call.args[1].value))
        for node in ast.walk(tree):
            name = dotted(node) if isinstance(node, ast.Attribute) and id(node) not in inner else None
            if name and name.startswith(("torch.npu.", "torch_npu.")):
                call = called.get(id(node))
                starred = call and any(keyword.arg is None for keyword in call.keywords)
                keywords = {keyword.arg for keyword in call.keywords} if call and not starred else None
                yield path.name, name, keywords, len(call.args) if call else 0, name in guarded


def look_up(version, name):
    """Return the signature of `name`, "" for one without, or None where the version does not have it."""
    other = "torch_npu.npu." + name[len("torch.npu.") :] if name.startswith("torch.npu.") else name
    found = [key for key in (name, other, name.replace("torch_npu.npu.", "torch.npu.")) if key in NAMES[version]]
    return (NAMES[version][found[0]] or "") if found else None


def parameters(signature):
    """Return the names of a signature's parameters; "self" is not one."""
    arguments = ast.parse("def function({}): pass".format(signature)).body[0].args
    return [argument.arg for argument in arguments.args + arguments.kwonlyargs if argument.arg != "self"]


def test_every_name_exists_with_the_signature_that_is_used():
    found = list(uses())
    names = {name for _, name, *_ in found}
    found += [("npu.py", name, keywords, 1, False) for name, keywords in FUSED.items()]
    assert {"torch.npu.set_device", "torch.npu.set_compile_mode", "torch.npu.amp.GradScaler"} <= names
    for version in NAMES:
        for file, name, keywords, count, guarded in found:
            where = "{}: {} in torch_npu {}".format(file, name, version)
            modules = name + ".", name.replace("torch.npu.", "torch_npu.npu.") + "."  # one by two names
            if any(known.startswith(modules) for known in NAMES[version]):
                continue  # a module of which names are looked up by getattr
            signature = look_up(version, name)
            if signature is None and guarded and version != NEWEST:
                continue
            assert signature is not None, where
            if signature and keywords is not None:
                known = parameters(signature)
                assert keywords <= set(known) and count <= len(known), "{} ({})".format(where, signature)


def test_the_list_of_names_is_that_of_the_wheel():
    code = """
import json, sys, torch, torch_npu
wrong = []
for name in json.loads(sys.argv[1]):
    place = torch_npu if name.startswith("torch_npu.") else torch
    try:
        for part in name.split(".")[1:]:
            place = getattr(place, part)
    except AttributeError:
        # Attributes of `config` can be set, and not be read.
        if not name.startswith("torch.npu.config."):
            wrong.append(name)
assert not wrong, wrong
"""
    assert_fine(run([PYTHON, "-c", code, json.dumps(list(NAMES[NEWEST]))], PYTHON=str(PYTHON)))
