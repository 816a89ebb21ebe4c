"""Official checkpoints of this network: timm's `spnasnet_100`, `.pth` or `.safetensors`, whose keys are ours."""


def _some(items, limit=3):
    """Return the first few `items` as text, and how many were left out."""
    rest = " and {} more".format(len(items) - limit) if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def convert(state, model):
    """Return (`state` in the key order of `model`, notes on what was changed: none here).

    `state` is a flat dict of tensors without wrappers and `module.` prefixes. The number of classes of its head may
    differ from the model's. Raises ValueError, one line, if it is the state of another network.
    """
    own = model.state_dict()
    head = list(own)[-2:]  # weight and bias: their first extent is the number of classes
    different = []
    for key in own:
        start = 1 if key in head else 0
        if key in state and state[key].shape[start:] != own[key].shape[start:]:
            different.append("{} is {}, not {}".format(key, tuple(state[key].shape), tuple(own[key].shape)))
    problems = (
        ("missing", [key for key in own if key not in state]),
        ("unknown", [key for key in state if key not in own]),
        ("different", different),
    )
    found = ["{}: {}".format(kind, _some(items)) for kind, items in problems if items]
    if found:
        raise ValueError("not a checkpoint of this {}; {}".format(type(model).__name__, "; ".join(found)))
    return {key: state[key] for key in own}, []
