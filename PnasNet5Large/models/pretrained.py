"""Official checkpoints of PNASNet-5-Large, and of Ascend's variant, for `pnasnet5large`."""


def convert(state, model):
    """Return `state` with the keys of `model`, and notes on what was changed.

    Args:
        state: dict of name to tensor, from Cadene, timm (the same names) or Ascend, or saved by this bundle; with any
            number of classes: the rows of `model.classifier_keys` are the caller's to adapt.
        model: a `pnasnet5large`. Where it has an auxiliary head and the file has none, its own is kept.
    """
    notes, state = [], dict(state)
    in_file = [key for key in state if key.startswith("aux.")]
    if in_file and not model.use_aux:
        for key in in_file:
            del state[key]
        notes.append("dropped the auxiliary head of the file: this model has none")
    if model.use_aux and not in_file:
        state.update((key, value) for key, value in model.state_dict().items() if key.startswith("aux."))
        notes.append("the file has no auxiliary head: kept the model's own")
    if len(state.get("last_linear.weight", ())) == 1001 and not model.zero_pad:
        reason = "1001 classes: likely the official weights, which expect zero_pad=True"
        notes.append(reason + "; this model pads differently and is less accurate until fine-tuned")
    return state, notes
