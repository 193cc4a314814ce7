"""Settings of the unit tests: one thread, no window, and the same random numbers in every test."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    """Seed all generators before a test, and undo a changed default dtype after it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # libraries that draw from the old global generator
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
