"""Public checkpoints: reading those of other libraries into a RecurrentLM, and writing them back for FLA."""

from lrm_recall.checkpoints.load import load
from lrm_recall.checkpoints.write import to_fla

__all__ = ["load", "to_fla"]
