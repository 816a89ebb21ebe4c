"""Official checkpoints of these networks: those of microsoft/SPACH, whose keys are ours."""


# Copied from SPNASNet_100/models/pretrained.py:convert
def convert(state, model):
    """Return (`state`, notes on what was changed): nothing was."""
    return state, []
