"""What differs between the releases of transformers that the tests may meet."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import DeepseekV3ForCausalLM

_NAMES = inspect.signature(DeepseekV3ForCausalLM.forward).parameters


def remembering(cache: Any) -> dict[str, Any]:
    """The argument that hands a model its cache: 5.24 renamed it, and warns of the old name."""
    return {"cache" if "cache" in _NAMES else "past_key_values": cache}
