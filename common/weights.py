"""Weights from elsewhere: any official checkpoint of a network, with whatever wrappers, prefixes and head it has."""

import torch

from common.errors import UserError, printable


def _weights(content, path):
    """Return the flat state dict inside `content`, without wrappers and `module.` prefixes."""
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError("{} holds no state dict".format(path))
    if all(key.startswith("module.") for key in content):
        content = {key[len("module.") :]: value for key, value in content.items()}
    return dict(content)


def load(model, content, path, convert, may_replace_head):
    """Load any official checkpoint of the network into `model`; return lines that say what was done.

    Args:
        model: the model; its `classifier_keys` are the prefixes of the layers whose size is the number of classes.
        content: what `read(path)` returned.
        path: for messages.
        convert: the bundle's `models.pretrained.convert(state, model) -> (state, notes)`, which translates the keys of
            other sources and raises ValueError for another network.
        may_replace_head: whether a head of another number of classes is left as initialised (fine-tuning).

    Raises:
        UserError: the weights are of another network, or of another number of classes.
    """
    state = _weights(content, path)
    try:
        state, notes = convert(state, model)
    except ValueError as error:
        raise UserError("{} does not fit: {}".format(path, error)) from None
    wanted = model.state_dict()
    for key in [key for key in state if key in wanted and state[key].shape != wanted[key].shape]:
        if not key.startswith(tuple(prefix + "." for prefix in model.classifier_keys)):
            raise UserError(
                "{} is of another network: {} is {}, not {}".format(
                    path, key, tuple(state[key].shape), tuple(wanted[key].shape)
                )
            )
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
    fresh = tuple(prefix + "." for prefix in model.classifier_keys) if may_replace_head else ()
    missing = [key for key in wanted if key not in state and not key.startswith(fresh)]
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in wanted]
    if missing or unknown:
        raise UserError(
            "{} is of another network: {} weights are missing ({}), {} are unknown ({})".format(
                path, len(missing), printable(", ".join(missing[:3])), len(unknown), printable(", ".join(unknown[:3]))
            )
        )
    merged = dict(wanted)
    merged.update(state)
    model.load_state_dict(merged)
    return ["loaded {} of {} tensors from {}".format(len(state), len(wanted), path)] + notes
