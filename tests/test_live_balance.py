"""The live picture against its counts, and a run in a thread against ``train``."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_mini.config import ConfigError, ModelConfig
from dsv3_mini.course.experts import small_moe
from dsv3_mini.data import Corpus, load_corpus
from dsv3_mini.model import Transformer
from dsv3_mini.train import Record, TrainConfig, train
from dsv3_mini.viz import live_run
from dsv3_mini.viz.live_balance import LiveBalance
from dsv3_mini.viz.live_run import MODES, REMAINING_ALPHA, LiveRun
from dsv3_mini.viz.load_picture import (
    BARS,
    HEAD,
    POINTS,
    ROW,
    SIZE,
    TOP,
    load_figure,
    load_svg,
    ratios,
    summary,
    thinned,
)
from dsv3_mini.viz.style import COLOURS, png

SVG = "{http://www.w3.org/2000/svg}"
TINY = ModelConfig.tiny()
SETTINGS = TrainConfig(
    steps=6, batch_size=2, seq_len=8, warmup=2, gamma=0.01, alpha=0.02, mtp_lambda=0.0
)
ENDLESS = 100_000


class Listening(Corpus):
    """A corpus that remembers which domain each batch was asked from."""

    def batch(self, step: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        asked = self.__dict__.setdefault("asked", [])
        asked.append((step, kwargs.get("domain")))
        return super().batch(step, *args, **kwargs)


def corpus() -> Listening:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(128, (300,), generator=generator) for _ in range(2))
    return Listening({"python": a, "prose": b}, {"python": a, "prose": b}, 128)


RUNS: list[LiveRun] = []


def new_run(total: int | None = None, **values: Any) -> LiveRun:
    torch.manual_seed(0)
    settings = dataclasses.replace(SETTINGS, **values.pop("settings", {}))
    run = LiveRun(Transformer(TINY), values.pop("text", corpus()), settings, total, **values)
    RUNS.append(run)
    return run


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """Every thread ends with its test."""
    yield
    while RUNS:
        assert RUNS.pop().stop()


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.perf_counter() + seconds
    while not holds():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.002)


def biases(run: LiveRun) -> list[Tensor]:
    return [gate.e_score_correction_bias.clone() for gate in run.model.gates]


def record(step: int, counts: list[list[int]], loss: float = 4.0, mtp: int = 0) -> Record:
    counts_LE = torch.tensor(counts)
    worst = [max(row) * len(row) / max(sum(row), 1) - 1 for row in counts]
    return Record(step, loss, (5.0,) * mtp, 2.0, 1e-3, 1.0, counts_LE, tuple(worst), 64, 0.1)


# ------------------------------------------------------------------------------------ the picture


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def bars_of(svg: str) -> list[ET.Element]:
    return [rect for rect in parse(svg).iter(f"{SVG}rect") if rect.get("class") == "bar"]


def test_bars_are_the_loads_over_their_mean() -> None:
    counts = [[10, 0, 30, 20, 15, 25, 12, 8], [1, 1, 1, 1, 1, 1, 1, 73], [6, 6, 6, 6, 6, 6, 6, 6]]
    svg = load_svg([record(7, counts)])
    bars = bars_of(svg)
    assert len(bars) == 24
    for index, bar in enumerate(bars):
        layer, expert = divmod(index, 8)
        ratio = counts[layer][expert] / (sum(counts[layer]) / 8)
        assert float(bar.get("height", "")) == pytest.approx(min(ratio, TOP) * BARS / TOP, abs=0.01)
        bottom = float(bar.get("y", "")) + float(bar.get("height", ""))
        assert bottom == pytest.approx(HEAD + layer * ROW + BARS, abs=0.02)
        assert bar.get("fill") == (COLOURS[0] if ratio > 2 else COLOURS[4])
        assert f"expert {expert}: {ratio:.2f} times the mean" in "".join(bar.itertext())
    # As many stripes as overloaded bars, and the one that is cut off says how tall it is.
    assert len(list(parse(svg).iter(f"{SVG}path"))) == 1
    assert ">7.3x<" in svg
    assert svg.count(">balanced<") == 3


def test_the_line_of_balance_is_at_one() -> None:
    svg = load_svg([record(1, [[5, 5, 5, 5]])])
    tops = {float(bar.get("y", "")) for bar in bars_of(svg)}
    thick = [line for line in parse(svg).iter(f"{SVG}line") if line.get("stroke-width") == "2"]
    assert [tops] == [{float(line.get("y1", ""))} for line in thick]


def test_words_for_those_who_do_not_see_it() -> None:
    last = record(1234, [[10, 30], [8, 8]], loss=3.217, mtp=1)
    svg = load_svg([last])
    root = parse(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == summary(last)
    for words in ("step 1,234", "MoE layer 1: MaxVio 0.50, expert 1", "1.50 times", "loss now 3.22",
                  "MoE layer 2 (MTP): MaxVio 0.00"):  # fmt: skip
        assert words in summary(last)
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)"', svg)]
    assert sizes == [SIZE]
    assert SIZE * 600 / 900 >= 11
    assert "id=" not in svg
    assert "MaxVio of each layer (0 = balanced)" in svg
    assert "nats per token" in svg


def test_equal_records_give_equal_text_and_changes_are_escaped() -> None:
    records = [record(step, [[step, 3]]) for step in range(1, 50)]
    changes = [(20, "bias <b>"), (80, "later")]
    svg = load_svg(records, changes)
    assert svg == load_svg(list(records), list(changes))
    assert "bias &lt;b&gt;" in svg
    assert "later" not in svg


@pytest.mark.parametrize("count", [1, 2, 199, 200, 201, 1000, 5000])
def test_a_long_history_is_drawn_with_few_points(count: int) -> None:
    one = record(1, [[3, 4, 5, 6]])
    records = [dataclasses.replace(one, step=37 + i, loss=5.0 + i) for i in range(count)]
    points = thinned(records)
    assert len(points) <= POINTS + 1
    assert len(points) >= min(count, 60)
    steps = [point.step for point in points]
    assert steps == sorted(steps)
    assert points[0].step - 37 == pytest.approx(points[0].loss - 5)
    lines = list(parse(load_svg(records)).iter(f"{SVG}polyline"))
    assert len(lines) == 2
    assert all(len(line.get("points", "").split()) == len(points) for line in lines)
    assert len(load_svg(records)) < 20_000


def test_a_finished_point_never_changes() -> None:
    records = [record(step, [[step % 7, 3]], loss=math.sin(step)) for step in range(1, 1001)]
    points = thinned(records)
    for seen in (990, 997, 999):
        assert thinned(records[:seen]) == points[: len(thinned(records[:seen]))]
    assert len(thinned(records[:997])) >= len(points) - 1


def test_points_are_means_of_their_steps() -> None:
    records = [record(step, [[step, 0]], loss=float(step)) for step in range(1000)]
    second, last = thinned(records)[1], thinned(records[:998])[-1]
    assert (second.step, second.loss) == (7, 7)  # of 5 to 9
    assert (last.step, last.loss) == (992, 992)  # 995 to 997 are not five yet


def test_odd_histories_are_drawn() -> None:
    assert "No step yet" in load_svg([])
    parse(load_svg([]))
    empty = [record(1, [[0, 0, 0]], loss=math.nan), record(2, [[0, 0, 0]], loss=math.inf)]
    svg = load_svg(empty)
    assert ratios(empty[0]) == [[0, 0, 0]]
    assert not re.search(r'="[^"]*(nan|inf)\b', svg.replace(summary(empty[1]), ""))
    many = [record(step, [[1] * 256] * 5) for step in (5, 6)]
    assert len(bars_of(load_svg(many))) == 5 * 256
    dense = dataclasses.replace(empty[0], counts_LE=torch.zeros(0, 1), max_violation=())
    for records in ([], empty, many, [dense]):
        parse(load_svg(records))
        assert png(load_figure(records))[:4] == b"\x89PNG"


def test_figure_has_the_same_bars() -> None:
    figure = load_figure([record(3, [[10, 30, 0, 0], [4, 4, 4, 4]])], [(3, "bias")])
    tall = [bar.get_height() for axes in figure.axes for bar in axes.patches]
    assert tall == [1.0, 3.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


# ------------------------------------------------------------------------------------- the thread


def test_an_untouched_run_is_train() -> None:
    run = new_run(mode="both", settings={"accumulate": 2})
    run.start()
    assert run.wait(20)
    torch.manual_seed(0)
    model = Transformer(TINY)
    expected = list(train(model, corpus(), dataclasses.replace(SETTINGS, accumulate=2)))
    assert [r.loss for r in run.records] == [r.loss for r in expected]
    assert [r.learning_rate for r in run.records] == [r.learning_rate for r in expected]
    assert all(
        torch.equal(a, b) for a, b in zip(run.model.parameters(), model.parameters(), strict=True)
    )
    assert run.changes == type(run.changes)([])
    assert (run.step, run.phase, run.mode_since, run.error) == (6, "ended", 1, None)


@pytest.mark.parametrize(
    ("mode", "gamma", "alpha", "batch"),
    [("off", 0, 0, 0), ("bias", 0.01, REMAINING_ALPHA, 0), ("auxiliary loss", 0, 0.02, 0.5),
     ("both", 0.01, 0.02, 0.5)],
)  # fmt: skip
def test_modes(mode: str, gamma: float, alpha: float, batch: float) -> None:
    run = new_run(mode=mode, settings={"alpha_batch": 0.5})
    used = run.controls.settings(run.settings)
    assert (used.gamma, used.alpha, used.alpha_batch) == (gamma, alpha, batch)
    rest = dataclasses.replace(used, gamma=0.01, alpha=0.02, alpha_batch=0.5)
    assert rest == run.settings


def test_controls_act_from_the_next_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are moved between two steps, in the thread, so that the step is known exactly."""
    text = corpus()
    run = new_run(total=12, text=text)
    alphas: list[float] = []
    step = live_run.train_step
    monkeypatch.setattr(
        live_run, "train_step", lambda m, s, c, b: (alphas.append(c.alpha), step(m, s, c, b))[1]
    )
    after: list[list[Tensor]] = []
    moves: dict[int, Callable[[], None]] = {
        2: lambda: run.set(mode="bias", gamma=0.25),
        4: lambda: run.set(mode="off"),
        6: lambda: run.set(domain="prose"),
        8: lambda: run.set(mode="both", alpha=0.5, gamma=0.125, domain=None),
        10: run.reset_bias,
        11: lambda: run.set(mode="auxiliary loss"),
    }

    def watch() -> None:
        if run.phase == "running":
            after.append(biases(run))
            moves.get(run.step, lambda: None)()

    run.watch = watch
    run.start()
    assert run.wait(20)
    for layer in range(len(run.model.gates)):
        bias = [torch.zeros_like(after[0][layer]), *(row[layer] for row in after)]
        loads = [r.counts_LE[layer].double() for r in run.records]
        gammas = [0, 0, 0.25, 0.25, 0, 0, 0, 0, 0.125, 0.125, 0.125, 0]
        for number, (load, gamma) in enumerate(zip(loads, gammas, strict=True)):
            start = torch.zeros_like(bias[0]) if number == 10 else bias[number]
            assert torch.equal(bias[number + 1], start + gamma * torch.sign(load.mean() - load))
        assert bias[4].abs().max() > 0
    small = REMAINING_ALPHA
    assert alphas == [0, 0, small, small, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]
    assert text.__dict__["asked"] == [(i, "prose" if i in (6, 7) else None) for i in range(12)]
    assert list(run.changes) == [
        (3, "bias, gamma 0.25"), (5, "off"), (7, "prose"),
        (9, "both, gamma 0.12, alpha 0.5, all text"), (11, "bias 0"), (12, "auxiliary loss"),
    ]  # fmt: skip
    assert run.mode_since == 12


def test_pause_rests_resume_goes_on_stop_ends() -> None:
    run = new_run(ENDLESS, mode="bias")
    assert run.stop()
    run.start()
    run.start()
    until(lambda: run.step >= 3)
    thread = run._thread
    assert run.pause()
    assert run.pause()
    here, state = run.step, biases(run)
    time.sleep(0.1)
    assert (run.step, run.phase) == (here, "paused")
    assert all(torch.equal(a, b) for a, b in zip(state, biases(run), strict=True))
    assert max(bias.abs().max() for bias in state) > 0
    run.reset_bias()
    assert all(not bias.any() for bias in biases(run))
    for _ in range(20):  # quick fingers
        run.resume()
        assert run.phase == "running"
        assert run.pause()
    run.resume()
    until(lambda: run.step >= here + 3)
    began = time.perf_counter()
    assert run.stop()
    assert time.perf_counter() - began < 2
    assert thread is not None
    assert not thread.is_alive()
    assert (run._thread, run.phase) == (thread, "ended")
    here = run.step
    assert run.model(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()
    assert all(p.grad is None for p in run.model.parameters())
    run.reset_bias()
    assert all(not bias.any() for bias in biases(run))
    run.start()  # and on from there
    assert run.pause()
    assert run.stop()
    assert run.step >= here


def test_model_is_left_in_the_mode_it_came_in() -> None:
    run = new_run()
    run.model.eval()
    run.start()
    assert run.wait(20)
    assert not run.model.training


def test_an_exception_is_kept_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(ENDLESS)
    live = LiveBalance(run)

    def burn(*_: object) -> None:
        raise RuntimeError("out of <coal>")

    run.start()
    until(lambda: run.step >= 2)
    with monkeypatch.context() as patch:
        patch.setattr(live_run, "train_step", burn)
        with pytest.raises(RuntimeError, match="out of <coal>"):
            run.wait(10)
    assert isinstance(run.error, RuntimeError)
    assert "Training failed.</b> RuntimeError: out of &lt;coal&gt;" in live.status.value
    assert run.stop()
    here = run.step
    live.toggle.click()  # and it can go on
    until(lambda: run.step > here)
    assert run.error is None
    assert run.stop()


def test_a_picture_that_fails_is_an_error_too() -> None:
    run = new_run()
    run.watch = lambda: 1 / 0  # type: ignore[assignment]
    run.start()
    with pytest.raises(ZeroDivisionError):
        run.wait(10)
    assert run.step == 1


def test_history_is_bounded() -> None:
    run = new_run(30, history=8)
    run.start()
    assert not run.wait(0)
    assert run.wait(20)
    assert [r.step for r in run.records] == list(range(23, 31))
    assert run.changes.maxlen is not None
    assert run.steps_per_second > 0
    assert run.seconds > 0


def test_bad_values_are_refused_and_change_nothing() -> None:
    run = new_run()
    before = run.controls
    with pytest.raises(ConfigError, match="expected one of"):
        run.mode = "on"
    for name, value in [("gamma", -1), ("alpha", math.nan), ("gamma", math.inf)]:
        with pytest.raises(ConfigError, match=name):
            setattr(run, name, value)
    with pytest.raises(ValueError, match="not 'poetry'"):
        run.domain = "poetry"
    assert run.controls == before
    for frames in ({"max_frames": 0}, {"per_second": 0}):
        with pytest.raises(ValueError, match="a second"):
            LiveBalance(run, **frames)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exceeds max_position_embeddings"):
        new_run(settings={"seq_len": TINY.max_position_embeddings + 1})


def test_python_ends_while_it_runs() -> None:
    program = (
        "from tests.test_live_balance import *\n"
        "run = new_run(ENDLESS); run.start()\n"
        "until(lambda: run.step > 2)\n"
        "print('bye')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, [b"bye"]), done.stderr


# ------------------------------------------------------------------------------------ the widgets


def test_buttons_drive_the_run() -> None:
    run = new_run(ENDLESS)
    live = LiveBalance(run)
    assert repr(live) == "LiveBalance: press Start, then move the controls while it trains"
    assert "No step yet" in live.image.value
    assert (live.toggle.description, live.halt.disabled) == ("Start", True)
    live.toggle.click()
    until(lambda: run.step >= 2)
    assert (run.phase, live.toggle.description, live.halt.disabled) == ("running", "Pause", False)
    live.toggle.click()
    assert (run.phase, live.toggle.description) == ("paused", "Resume")
    assert f"at step {run.step:,}:" in live.image.value  # what is shown is what one may inspect

    assert (live.gamma.disabled, live.alpha.disabled) == (True, True)
    live.mode.value = "both"
    live.gamma.value, live.alpha.value = 0.1, 0.01
    assert (run.mode, run.gamma, run.alpha) == ("both", 0.1, 0.01)
    assert (live.gamma.disabled, live.alpha.disabled) == (False, False)
    seen = []
    for _ in range(3):
        live.domain.click()
        seen.append((run.domain, live.domain.description))
    assert seen == [("python", "text: python"), ("prose", "text: prose"), (None, "text: all")]

    here = run.step
    live.toggle.click()
    assert live.toggle.description == "Pause"
    until(lambda: run.step >= here + 2)
    assert max(bias.abs().max() for bias in biases(run)) >= 0.1
    live.toggle.click()
    live.reset.click()
    assert all(not bias.any() for bias in biases(run))
    live.toggle.click()
    live.halt.click()
    assert (run.phase, live.toggle.description, live.halt.disabled) == ("ended", "Go on", True)
    assert f"at step {run.step:,}:" in live.image.value
    assert f"balance by both since step {here + 1}" in live.status.value
    assert png(live.picture())[:4] == b"\x89PNG"
    live.close()


def test_a_run_in_every_mode_starts_with_its_own_values() -> None:
    for mode in MODES:
        run = new_run(mode=mode, settings={"gamma": 0.5, "alpha": 0.003})
        live = LiveBalance(run)
        assert (live.mode.value, live.alpha.value, run.alpha) == (mode, 0.003, 0.003)
        assert live.gamma.value == run.gamma == pytest.approx(0.1)


@pytest.mark.parametrize(("total", "most"), [(40, 5), (7, 200), (30, 1), (3, 3)])
def test_frames_stay_below_their_number(total: int, most: int) -> None:
    run = new_run(total)
    live = LiveBalance(run, max_frames=most, per_second=1e9)
    for start in (1, 2):
        shown: list[str] = []
        live.image.observe(lambda change, shown=shown: shown.append(change.new), names="value")
        run.start()
        assert run.wait(20)
        live.image.unobserve_all()
        assert 1 <= len(shown) <= live.frames <= most
        assert f"at step {total * start}:" in shown[-1]  # the last one shows the end


def test_frames_are_left_out_when_there_are_enough_a_second() -> None:
    run = new_run(60)
    live = LiveBalance(run, per_second=0.001)
    run.start()
    assert run.wait(20)
    assert live.frames <= 2  # the first and the last


def test_a_slow_front_end_costs_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(ENDLESS)
    live = LiveBalance(run, per_second=1e9)
    live.image.observe(lambda _: time.sleep(0.03), names="value")
    run.total = 1000  # so that steps do not hold pictures back
    began = time.perf_counter()
    run.start()
    time.sleep(0.7)
    assert run.stop()
    assert 1 <= live.frames <= (time.perf_counter() - began) / 0.3 + 3


def test_a_control_moves_only_what_it_is_for() -> None:
    """A mode set on the run, by a cell, stays when the reader moves gamma."""
    run = LiveRun(Transformer(small_moe()), load_corpus(), TrainConfig(steps=2), mode="off")
    live = LiveBalance(run)
    run.mode = "bias"
    live.gamma.value = 0.05
    assert (run.mode, run.gamma) == ("bias", 0.05)
    live.mode.value = "both"
    assert (run.mode, run.gamma) == ("both", 0.05)
    live.close()
