"""The benchmark's arithmetic, tables and machinery. Nothing that a clock said is asserted."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini.accounting import cache_bytes
from dsv3_mini.config import ModelConfig, RopeScaling
from dsv3_mini.data import load_corpus
from dsv3_mini.model import Transformer
from tests.bench import __main__ as command
from tests.bench import growth, layers, memory, notebooks, report, speculation
from tests.bench.figure import draw, rows_of
from tests.bench.implementations import (
    DEFAULT,
    EAGER,
    LLAMA,
    OURS,
    Ours,
    active_parameters,
    assert_same,
    write_model,
)
from tests.bench.measure import CACHE, measure
from tests.bench.memory import Held
from tests.bench.plan import FULL, QUICK, Plan, moe_config, scaled
from tests.bench.products import PRODUCTS, record, replay
from tests.bench.results import Machine, Results
from tests.bench.timing import Entrant, Pace, Race, digits, duration, run_race, slope
from tests.bench.whole import random_tokens
from tests.environment import ROOT

TINY = ModelConfig.tiny().replace(num_nextn_predict_layers=0)
SMALL_V3 = ModelConfig.v3().replace(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    rope_scaling=RopeScaling(original_max_position_embeddings=16),
)  # fmt: skip
VECTORS = {  # a matrix times one token, which torch's counter leaves out
    torch.ops.aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
    torch.ops.aten.addmv: lambda added, matrix, vector, **_: 2 * math.prod(matrix),
}
ONCE = Pace(least=2, seconds=0.0)
TINY_PLAN = Plan(
    sizes={"tiny": TINY}, prefill=(8, 70), decode=(5, 70), train=(2, 12), all_peaks=True,
    experts=(16, 32), moe_tokens=(1, 6), mla=SMALL_V3, mla_contexts=(3, 20), batches=(1, 2),
    widths=(32, 64), prompts=1, new_tokens=5, pace=ONCE, slow=ONCE,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_results() -> Results:
    """The whole machinery on models of a few thousand weights, without further processes."""

    def ask(folder: Path, name: str, what: str, batch: int, length: int, threads: int):  # type: ignore[no-untyped-def]
        return memory.measure(folder, name, what, batch, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "ask", ask)
        patch.setattr(memory, "give_back_freed", lambda: None)  # slow beside a test run's objects
        patch.setattr(speculation, "load_corpus", partial(load_corpus, ("python",), 20_000))
        return measure(TINY_PLAN, [1])


def test_everything_is_measured(tiny_results: Results) -> None:
    raced = {(race.what, race.size, race.at): set(race.seconds) for race in tiny_results.races}
    whole, moe = {OURS, DEFAULT, EAGER, LLAMA}, {OURS, DEFAULT, EAGER, layers.LIMIT, PRODUCTS}
    expected = {("training step", "tiny", 2): whole | {PRODUCTS}}
    for length, context in ((8, 5), (70, 70)):
        for what, at in (("prefill", length), ("decode", context)):
            expected[what, "tiny", at] = whole | {PRODUCTS}
    for experts in (16, 32):
        expected["MoE layer, 1 token", "hidden 512", experts] = moe
        expected["MoE layer, 6 tokens", "hidden 512", experts] = moe
    for context in (3, 20):
        expected["MLA layer, decode", "hidden 64", context] = {
            OURS, layers.OFFICIAL, DEFAULT, PRODUCTS,
        }  # fmt: skip
    for batch, width in ((1, 32), (2, 64)):
        expected["training step", "tiny, by batch", batch] = {OURS}
        expected["training step", "tiny, by width", width] = {OURS}
    expected["greedy decoding", "trained model", 5] = {"speculative", "plain decoding"}
    assert raced == expected
    for race in tiny_results.races:
        assert (PRODUCTS in race.seconds) == bool(race.launches), race.label
    samples = [times for race in tiny_results.races for times in race.seconds.values()]
    assert all(len(times) == 2 and min(times) > 0 for times in samples)
    assert {one.what for one in tiny_results.held} == {
        memory.TRAINING, memory.LIVE, memory.PREFILL, CACHE,
    }  # fmt: skip
    assert len(tiny_results.curves) == 7
    assert (drafts := tiny_results.drafts) is not None
    assert 1 <= drafts.drafted <= drafts.steps < drafts.tokens == 5


def test_caches_hold_what_the_formula_says(tiny_results: Results) -> None:
    held = [one for one in tiny_results.held if one.what == CACHE]
    assert [one.at for one in held] == [5, 70]
    for one in held:
        latents = cache_bytes(TINY, one.at, bytes_per_number=4)
        keys_and_values = 4 * 2 * TINY.num_hidden_layers * TINY.hidden_size * one.at
        expected = {OURS: latents, DEFAULT: latents, EAGER: latents, LLAMA: keys_and_values}
        assert one.nbytes == expected


def test_results_are_written(
    tiny_results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, in place of whose measurements stand those above; its plan and threads."""
    given: list[tuple[Plan, list[int]]] = []

    def pretend(plan: Plan, threads: list[int]) -> Results:
        given.append((plan, threads))
        return tiny_results

    monkeypatch.setattr(command, "measure", pretend)
    monkeypatch.setattr("sys.argv", ["bench", "--threads", "2", "--out", str(tmp_path / "out")])
    assert command.main() == 0
    monkeypatch.setattr(command, "write", lambda results, out: None)
    for words in (["--quick"], []):
        monkeypatch.setattr("sys.argv", ["bench", *words])
        assert command.main() == 0
    assert given == [(FULL, [2]), (QUICK, [1]), (FULL, [1, 2])]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "bench.json", "bench.md", "bench.png",
    }  # fmt: skip
    assert "our launches" in (tmp_path / "out/bench.md").read_text(encoding="utf-8")
    loaded = json.loads((tmp_path / "out/bench.json").read_text(encoding="utf-8"))
    assert loaded == json.loads(json.dumps(dataclasses.asdict(tiny_results)))
    assert (tmp_path / "out/bench.png").read_bytes().startswith(b"\x89PNG")


def test_products_are_replayed_and_the_rest_is_counted() -> None:
    a, b, ran = torch.randn(2, 3), torch.randn(3, 4), []
    recorder = record(lambda: ((a @ b).relu() @ b.T).t().exp())
    assert len(recorder.products) == 2
    assert recorder.others == 2, "relu and exp; a transposed view is no launch"
    for number, product in enumerate(recorder.products):
        recorder.products[number] = lambda product=product: ran.append(product())  # type: ignore[misc]
    replay(recorder)
    torch.testing.assert_close(ran, [a @ b, (a @ b).relu() @ b.T])
    with pytest.raises(RuntimeError, match="no product"):
        record(lambda: a.exp())


@torch.no_grad()
def test_every_product_of_the_model_is_recorded() -> None:
    model, tokens = Transformer(TINY).requires_grad_(False), torch.arange(6)[None]
    cache = model.new_cache(1, 7)
    for now, absorb in ((tokens, False), (tokens[:, :1], True)):
        with FlopCounterMode(display=False, custom_mapping=VECTORS) as all_of_it:
            model(now, cache, absorb=absorb)
        cache.truncate(cache.length - now.shape[1])
        recorder = record(partial(model, now, cache, absorb=absorb))
        with FlopCounterMode(display=False, custom_mapping=VECTORS) as products:
            replay(recorder)
        assert products.get_total_flops() == all_of_it.get_total_flops() > 0


def test_products_of_a_training_step_are_those_of_both_passes() -> None:
    ours = Ours(Transformer(TINY))
    step = partial(ours.train, random_tokens(TINY, 8, 13))
    step()  # makes the optimizer's state
    with FlopCounterMode(display=False, custom_mapping=VECTORS) as all_of_it:
        step()
    recorder = record(step)
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    with FlopCounterMode(display=False, custom_mapping=VECTORS) as products:
        replay(recorder)
    assert products.get_total_flops() == all_of_it.get_total_flops() > 0
    torch.testing.assert_close(list(ours.model.parameters()), before, rtol=0, atol=0)


def test_a_race_is_run_in_turn() -> None:
    calls: list[str] = []

    def entrant(name: str) -> Entrant:
        return Entrant(lambda: calls.append(name), lambda: calls.append(f"before {name}"))

    both = {"a": entrant("a"), "b": entrant("b")}
    race = run_race(Race("what", "size", 1, "tokens", 1), both, Pace(2, 0.0))
    assert calls == ["before a", "a", "before b", "b"] * 3, "the first round does not count"
    assert [len(times) for times in race.seconds.values()] == [2, 2]
    calls.clear()
    run_race(Race("what", "size", 1, "tokens", 1), both, Pace(1, 1e9, most=4), warm=False)
    assert len(calls) == 4 * 4


def test_medians_ratios_and_slopes_are_numpys() -> None:
    draw_from = np.random.default_rng(0)
    for rounds in (1, 2, 5, 8):
        ours, theirs = draw_from.uniform(0.1, 2, (2, rounds))
        race = made_up("decode", 8, ours.tolist(), theirs.tolist())
        each = theirs / ours
        assert race.median("other") == pytest.approx(np.median(theirs))
        expected = (np.median(each), each.min(), each.max())
        assert race.ratio("other") == pytest.approx(expected)
    assert slope([1, 3, 10], [5, 5 * 3**1.7, 5 * 10**1.7]) == pytest.approx(1.7)


def made_up(what: str, at: int, ours: list[float], other: list[float], threads: int = 2) -> Race:
    return Race(what, "mini", at, "tokens", threads, {OURS: ours, "other": other})


MADE_UP = Results(
    Machine("a CPU", 2, "2.x", "5.x", "3.x", "a system", "2000-01-01"),
    races=[
        made_up("decode", 128, [0.002, 0.004, 0.003], [0.006, 0.004, 0.006]),
        made_up("decode", 1024, [0.5, 0.5], [0.25, 0.75]),
        made_up("decode", 1024, [9.0], [9.0], threads=1),
        Race("training step", "mini, by batch", 4, "sequences", 2, {OURS: [1.0]}),
    ],
    held=[
        Held("cache", "mini", 128, "tokens", "looking", {OURS: 1000, "other": 2500}),
        Held("cache", "mini", 1024, "tokens", "looking", {OURS: 3 * 2**20, "other": 3 * 2**20}),
    ],
)


def test_tables_say_what_was_measured() -> None:
    text = report.markdown(MADE_UP)
    for line in (
        "a CPU, 2 cores; torch 2.x, transformers 5.x, Python 3.x; 2000-01-01.",
        "| size | at | threads | dsv3_mini | other |",
        "| mini | 128 tokens | 2 | 3.00 ms (2.00 ms to 4.00 ms) | 6.00 ms, **2.00** (1.00 to 3.00)"
        " |",
        "| mini | 1,024 tokens | 1 | 9.00 s (9.00 s to 9.00 s) | 9.00 s, **1.00** (1.00 to 1.00) |",
        "| mini | 128 tokens | 1,000 B | 2.44 KiB, **2.50** |",
    ):
        assert line in text.splitlines()
    assert "by batch" not in text, "what has nothing beside it belongs to growth"
    assert report.summary(MADE_UP).splitlines()[2:] == [
        "| what | ours | others / ours |",
        "| --- | --- | --- |",
        "| decode, 128 tokens, mini | 3.00 ms | other 2.00 |",
        "| decode, 1,024 tokens, mini | 500 ms | other 1.00 |",
        "| cache, 1,024 tokens, mini | 3.00 MiB | other 1.00 |",
    ]
    timed = notebooks.NotebookTimes(301.2, True, {"a": 1.0, "b": 300.0})
    with_notebooks = dataclasses.replace(MADE_UP, notebooks=timed)
    last = report.summary(with_notebooks).splitlines()[-1]
    assert last == "| 2 notebooks, executed and compared | 301 s |  |"
    assert "| b | 300.0 |" in report.markdown(with_notebooks).splitlines()
    rows = [("decode, 128 tokens, mini", (2.0, 1.0, 3.0))]
    rows += [
        ("decode, 1,024 tokens, mini", (1.0, 0.5, 1.5)),
        ("cache, 1,024 tokens, mini", (1,) * 3),
    ]
    for (label, others), (expected, ratio) in zip(rows_of(MADE_UP), rows, strict=True):
        assert label == expected
        assert others["other"] == pytest.approx(ratio)
    assert len(draw(MADE_UP).subfigs) == 2


def test_numbers_have_three_digits() -> None:
    assert [digits(x) for x in (0.01234, 0.4, 1.856, 22.84, 412.3, 1240, 0)] == [
        "0.0123", "0.400", "1.86", "22.8", "412", "1,240", "0",
    ]  # fmt: skip
    assert [duration(x) for x in (1.25, 0.0084, 4.12e-4)] == ["1.25 s", "8.40 ms", "412 µs"]


def test_publishing_needs_its_markers(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("bench.png", "bench.json"):
        (tmp_path / name).write_bytes(name.encode())
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    for _ in range(2):
        report.publish(MADE_UP, tmp_path, tmp_path)
    expected = f"above\n{report.BEGIN}\n{report.summary(MADE_UP).strip()}\n{report.END}\nbelow\n"
    assert readme.read_text() == expected
    assert (tmp_path / "figures/bench.json").read_bytes() == b"bench.json"
    for text in ("nothing", report.BEGIN, f"{report.END}\n{report.BEGIN}", expected * 2):
        readme.write_text(text)
        with pytest.raises(report.MarkerError, match="bench:begin"):
            report.publish(MADE_UP, tmp_path, tmp_path)
        assert readme.read_text() == text


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_the_official_arrangement_computes_the_same(seed: int) -> None:
    """And so does transformers' layer: at every context, on one set of weights."""
    torch.manual_seed(seed)
    layer = layers.MLA(SMALL_V3, 40)
    for context in (1, 2, 17, 40):
        layer.put_back(context)
        ours = layer.ours.step(context)
        assert ours.std() > 0.01
        assert_same(ours, layer.official_step(context), "official")
        assert_same(ours, layer.their_step(context), "transformers")
    layer.official.kv_cache_BTC[:, 3] += 1
    with pytest.raises(AssertionError, match="not the same model"):
        assert_same(ours, layer.official_step(40), "official")


@pytest.mark.parametrize("size", FULL.sizes)
def test_the_llama_is_of_like_size(size: str) -> None:
    both = active_parameters(FULL.sizes[size])
    assert both[LLAMA] == pytest.approx(both[OURS], rel=0.1)


@torch.no_grad()
def test_operations_are_those_that_torch_counts() -> None:
    model = Transformer(TINY)
    for context in (1, 9):
        cache = model.new_cache(1, context + 1)
        model(torch.zeros(1, context, dtype=torch.int64), cache)
        with FlopCounterMode(display=False, custom_mapping=VECTORS) as counter:
            model(torch.zeros(1, 1, dtype=torch.int64), cache, absorb=True)
        assert counter.get_total_flops() == growth.decode_operations(TINY, context)
    for experts, tokens in ((16, 1), (16, 7), (32, 7)):
        config = moe_config(experts)
        x = torch.zeros(tokens, config.hidden_size)
        with FlopCounterMode(display=False) as counter:
            layers.matmul_limit(config, x).run()
        router = 2 * tokens * config.hidden_size * experts
        total = growth.moe_operations(tokens, experts)
        assert counter.get_total_flops() == total - router


def test_all_widths_grow_together() -> None:
    base = FULL.sizes["mini"]
    double = scaled(base, 2 * base.hidden_size)
    changed = {name for name, value in vars(base).items() if getattr(double, name) != value}
    assert len(changed) == 7
    assert all(getattr(double, name) == 2 * getattr(base, name) for name in changed)


def test_peak_memory_of_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training step holds at least its gradients, which this model's size decides."""
    config = ModelConfig.mini().replace(num_nextn_predict_layers=0)
    write_model(config, tmp_path / "model")
    answer = memory.ask(tmp_path / "model", OURS, memory.TRAINING, 2, 64, 1)
    gradients = 4 * sum(p.numel() for p in Transformer(config).parameters())
    assert int(answer["nbytes"]) > gradients
    assert answer["how"] in ("VmHWM, reset before the run", "ru_maxrss since the start")
    failed = subprocess.CompletedProcess([], 1, "", "a reason")
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: failed)
    with pytest.raises(RuntimeError, match="a reason"):
        memory.ask(tmp_path / "model", OURS, memory.TRAINING, 2, 64, 1)


def test_times_of_notebooks_are_summed() -> None:
    case = '<testcase classname="notebooks.{}" time="{}"/>'
    cases = [case.format(name, time) for name, time in (("a", 1.5), ("b", 2), ("a", 0.25))]
    xml = f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"
    assert notebooks.read_report(xml) == {"notebooks.a": 1.75, "notebooks.b": 2.0}


def test_the_readme_says_what_the_benchmark_counted() -> None:
    recorded = json.loads((ROOT / "figures/bench.json").read_text(encoding="utf-8"))
    race = next(r for r in recorded["races"] if (r["what"], r["size"]) == ("decode", "mini"))
    said = "{products} products and {others} other small operations".format(**race["launches"])
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")
