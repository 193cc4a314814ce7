"""Loading holds the model, one shard's pages and a few tensors: a process's peak, from Linux."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.checkpoint import save_pretrained

# Resets its peak after a first small load, so that libraries do not count.
CHILD = """
import sys
from dsv3_mini.checkpoint import load_pretrained
def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024
load_pretrained(sys.argv[1])
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = load_pretrained(sys.argv[2])
tensors = [*model.parameters(), *model.buffers()]
print(memory("VmHWM") - before, sum(t.nbytes for t in tensors))
"""
BIG = ModelConfig.mini().replace(hidden_size=512, moe_intermediate_size=512, n_routed_experts=32)
SHARD = 8_000_000
TABLE = 2048 * 512 * 4  # the largest tensor that is stored


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize("fp8", [False, True])
def test_peak_is_the_model_and_little_more(tmp_path: Path, fp8: bool) -> None:
    """431 MB in fp32; all of it again, or all FP8 codes (108 MB) beside it, would be seen."""
    save_pretrained(Transformer(ModelConfig.tiny()), tmp_path / "tiny", fp8=fp8)
    save_pretrained(Transformer(BIG), tmp_path / "big", fp8=fp8, max_shard_bytes=SHARD)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "tiny"), str(tmp_path / "big")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, model = map(int, done.stdout.split())
    print(f"model {model / 1e6:.0f} MB, peak {(peak - model) / 1e6:+.1f} MB")
    assert model > 400_000_000
    assert peak < model + SHARD + 4 * TABLE
