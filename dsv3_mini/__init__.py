"""dsv3_mini: DeepSeek-V3, small enough to read and to run. Start with ``notebooks/``."""

from dsv3_mini.config import ModelConfig
from dsv3_mini.model import Transformer

__all__ = ["ModelConfig", "Transformer"]
