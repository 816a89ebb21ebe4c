"""As in the real one, the functions come from here."""

from .frontend import initialize, load_state_dict, scale_loss, state_dict

__all__ = ["initialize", "load_state_dict", "scale_loss", "state_dict"]
