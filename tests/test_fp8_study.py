"""The study of FP8 training: what it compares, what it keeps, and that the record is its own."""

import json
import math
from pathlib import Path

import pytest
import torch

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.course import fp8_study
from dsv3_mini.course.fp8_study import FROM_SCRATCH, WAYS, Arithmetic, Outcome
from dsv3_mini.fp8 import SQUARE, Recipe, convert_to_fp8, dequantize, quantize


def test_smooth_is_the_running_mean_written_out() -> None:
    assert fp8_study.smooth([3.0]) == [3.0]
    expected = [1.0, 0.9 + 0.2, 0.81 + 0.18 + 0.5]
    assert fp8_study.smooth([1.0, 2.0, 5.0]) == pytest.approx(expected)


def test_differences_are_relative_and_by_pairs() -> None:
    ours, base = [Outcome([2.2], 0), Outcome([3.0], 0)], [Outcome([2.0], 0), Outcome([4.0], 0)]
    assert fp8_study.differences(ours, base) == pytest.approx([0.1, -0.25])
    with pytest.raises(ValueError, match="shorter"):
        fp8_study.differences(ours, base[:1])


def test_runs_of_a_seed_start_alike_and_see_the_same_text() -> None:
    first = {name: fp8_study.run(way, 0, 2) for name, way in FROM_SCRATCH.items()}
    exact = first["fp32"].losses[0]
    for name, outcome in first.items():
        assert len(outcome.losses) == 2
        assert math.isclose(outcome.losses[0], exact, rel_tol=2e-3), name
    assert first["FP8 as V3"].losses[0] != exact
    assert fp8_study.run(FROM_SCRATCH["fp32"], 1, 1).losses[0] != exact
    assert fp8_study.run(FROM_SCRATCH["fp32"], 0, 2, stop=1).losses == first["fp32"].losses[:1]


def test_rounded_weights_are_codes_and_the_others_are_left() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.tiny())
    convert_to_fp8(model, Recipe())
    head = model.lm_head.weight.clone()
    experts = model.model.layers[-1].mlp.experts.gate_proj
    fp8_study.round_weights(model)
    assert torch.equal(head, model.lm_head.weight)
    assert torch.equal(experts, dequantize(*quantize(experts.detach(), SQUARE), SQUARE))


def test_the_record_holds_every_way_and_stays_within_the_bound() -> None:
    record = fp8_study.recorded()
    assert record.keys() == WAYS.keys()
    for runs in record.values():
        assert [len(one.losses) for one in runs] == [fp8_study.STEPS] * fp8_study.SEEDS
    each = fp8_study.differences(record["FP8 as V3"], record["fp32"])
    assert abs(sorted(each)[2]) < 0.0025


def test_a_named_way_is_run_again_and_the_rest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"ways": {"fp32": [{"losses": [1.0], "held_out": 1.0}]}}))
    monkeypatch.setattr(fp8_study, "RECORD", path)
    monkeypatch.setitem(WAYS, "small", Arithmetic(Recipe(), scratch=True))
    before = path.read_text()
    assert fp8_study.main(["smal"]) == 2
    assert "no way is called smal; there are fp32" in capsys.readouterr().out
    assert path.read_text() == before
    assert fp8_study.main(["small"], seeds=1, steps=1) == 0
    kept = fp8_study.recorded()
    assert kept["fp32"] == [Outcome([1.0], 1.0)]
    assert len(kept["small"][0].losses) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.json"]
    path.unlink()
    with pytest.raises(ValueError, match=r"python -m dsv3_mini\.course\.fp8_study makes it"):
        fp8_study.recorded()
