"""Official checkpoints of PNASNet-5-Large, and of Ascend's variant, for `pnasnet5large`."""

from collections import OrderedDict


def fit(state, model):
    """Return `state` in the order of the model's keys; the classifiers may have any number of rows.

    Raises ValueError, naming the first tensors that do not fit, when it is not a state dict of this network.
    """
    target = model.state_dict()
    heads = tuple(key + "." for key in model.classifier_keys)
    fitted, wrong, missing = OrderedDict(), [], []
    for key, wanted in target.items():
        first = 1 if key.startswith(heads) else 0
        if key not in state:
            if key.endswith("num_batches_tracked"):  # files older than torch 0.4.1 have none
                fitted[key] = wanted.clone()
            else:
                missing.append("it has no {}".format(key))
        elif state[key].shape[first:] != wanted.shape[first:]:
            wrong.append("{} is {}, not {}".format(key, tuple(state[key].shape), tuple(wanted.shape)))
        else:
            fitted[key] = state[key]
    wrong += ["it has {} {}".format(key, tuple(state[key].shape)) for key in state if key not in target]
    wrong += missing
    if wrong:
        more = " and {} more".format(len(wrong) - 3) if len(wrong) > 3 else ""
        reason = "; ".join(wrong[:3]) + more
        raise ValueError("not a checkpoint of this {}: {}".format(type(model).__name__, reason))
    return fitted


def convert(state, model):
    """Return `state` with the keys of `model`, and notes on what was changed.

    Args:
        state: dict of name to tensor, from Cadene, timm (the same names) or Ascend, or saved by this bundle; with any
            number of classes: the rows of `model.classifier_keys` are the caller's to adapt.
        model: a `pnasnet5large`. Where it has an auxiliary head and the file has none, its own is kept.

    Raises ValueError when it is another network's file.
    """
    notes = []
    state = OrderedDict(state)
    in_file = [key for key in state if key.startswith("aux.")]
    if in_file and not model.use_aux:
        for key in in_file:
            del state[key]
        notes.append("dropped the auxiliary head of the file: this model has none")
    if model.use_aux and not in_file:
        state.update((key, value.clone()) for key, value in model.state_dict().items() if key.startswith("aux."))
        notes.append("the file has no auxiliary head: kept the model's own")
    state = fit(state, model)
    if len(state["last_linear.weight"]) == 1001 and not model.zero_pad:
        reason = "1001 classes: likely the official weights, which expect zero_pad=True"
        notes.append(reason + "; this model pads differently and is less accurate until fine-tuned")
    return state, notes
