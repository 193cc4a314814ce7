"""Every notebook's last part at V3's width, on a card that is not there.

A cell tagged ``full-width`` needs the imports of its notebook's first code cell and nothing else.
Both are run here as ``DSV3_SCALE=full DSV3_DEVICE=cuda`` would run them, on fake tensors: a wrong
shape, a dtype that does not fit and a tensor left on the CPU show; numbers do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv3_mini import ModelConfig
from dsv3_mini.config import ConfigError
from dsv3_mini.course.fake import fake
from dsv3_mini.environment import build_on, device, scale
from dsv3_mini.moe import MoE
from tests.environment import notebook_paths
from tests.notebooks import health

PATHS = [path for path in notebook_paths() if health.full_width_cells(health.read(path))]
NAMES = {path.stem.partition("_")[0] for path in PATHS}


@pytest.fixture(params=["full"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The scale that the two variables name, on a Hopper card that only they believe in."""
    monkeypatch.setenv("DSV3_SCALE", request.param)
    monkeypatch.setenv("DSV3_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return str(request.param)


def run(imports: str, cells: list[str]) -> list[Tensor]:
    """Execute ``imports``, then ``cells`` on the fake card; all tensors that the cells left."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(imports, names)
    before = dict(names)
    with fake():
        for source in cells:
            exec(source, names)
    made = {k: v for k, v in names.items() if k != "__builtins__" and before.get(k) is not v}
    return list(tensors_in(made, set()))


def tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in nested containers, modules, and objects of this package."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    inner: list[object] = []
    if isinstance(value, nn.Module):
        inner = [*value.parameters(), *value.buffers()]
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    elif type(value).__module__.startswith("dsv3_mini") and hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    for each in inner:
        yield from tensors_in(each, seen)


def left_behind(tensors: list[Tensor]) -> list[str]:
    return [f"{tuple(t.shape)} on {t.device}" for t in tensors if t.device.type != "cuda"]


@pytest.mark.parametrize("chosen", ["gpu", "full"], indirect=True)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_cells_run_on_the_card(
    path: Path, chosen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = health.read(path)
    first = next(c for _, c in health.code_cells(notebook) if health.INSTALL not in health.tags(c))
    tensors = run(first.source, [cell.source for cell in health.full_width_cells(notebook)])
    printed = capsys.readouterr().out
    assert len(tensors) > 1
    assert not left_behind(tensors)
    if chosen == "full":
        assert "7168" in printed or "7,168" in printed, "nothing of V3's width was printed"


def test_every_notebook_up_to_10_has_such_a_cell() -> None:
    assert {f"{number:02d}" for number in range(11)} | {"05b"} <= NAMES


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("y = torch.zeros(4, 7168, device=where) + torch.zeros(7168)", "cpu"),
        ("y = build_on(where, MoE, ModelConfig.v3())(torch.zeros(1, 4, 7168))", "cpu|device"),
        ("y = torch.zeros(4, 7168, device=where) @ torch.zeros(7169, 5, device=where)", "7169"),
        ("y = torch.zeros(4, 7168, device=where).sum().item()", "local_scalar"),
    ],
)
@pytest.mark.usefixtures("chosen")
def test_a_wrong_cell_fails(source: str, message: str) -> None:
    imports = f"import torch\nfrom {__name__} import MoE, ModelConfig, build_on, device"
    with pytest.raises(Exception, match=message):
        run(imports, [f"where = device()\n{source}"])


@pytest.mark.usefixtures("chosen")
def test_what_a_cell_leaves_on_the_cpu_is_found() -> None:
    source = "where = device()\nx = {'rows': [torch.zeros(7168)]}\ny = torch.zeros(2, device=where)"
    tensors = run(f"import torch\nfrom {__name__} import device", [source])
    assert left_behind(tensors) == ["(7168,) on cpu"]


def test_scale_and_device_refuse_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3_SCALE", "huge")
    with pytest.raises(ConfigError, match="'huge'; expected one of mini, gpu, full"):
        scale()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DSV3_DEVICE", "cuda")
    with pytest.raises(ConfigError, match="where torch sees a card"):
        device()


def test_build_on_gives_random_matrices_in_the_dtype_and_biases_in_fp32() -> None:
    layer = build_on("cpu", MoE, ModelConfig.mini())
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in layer.parameters())
    assert 0.005 < float(layer.experts.up_proj.float().std()) < 0.007
    bias = layer.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert not bias.any()
    assert list(layer.state_dict()) == list(MoE(ModelConfig.mini()).state_dict())
