"""What both checkpoints together give away: the edit read off the weights, and generation guided by the original."""

from attacks.difference.guidance import guided
from attacks.difference.readout import Readout, TensorEdit, read_edit, rise, telling

__all__ = ["Readout", "TensorEdit", "guided", "read_edit", "rise", "telling"]
