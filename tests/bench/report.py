"""Results as Markdown: all of them for ``bench.md``, those at the most threads for the README."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.bench.growth import Curve
from tests.bench.implementations import LLAMA, OURS
from tests.bench.memory import Held
from tests.bench.results import Results
from tests.bench.timing import Race, digits, duration

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


class MarkerError(ValueError):
    """The README has no place for the table."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(low: float, high: float) -> str:
    """How far rounds lie apart."""
    return f"{digits(low)} to {digits(high)}"


def cell(race: Race, name: str) -> str:
    """Ours: median and spread. Others: their median, and how many times ours it is."""
    if name not in race.seconds:
        return ""
    times = race.seconds[name]
    if name == race.first:
        return f"{duration(race.median(name))} ({duration(min(times))} to {duration(max(times))})"
    middle, low, high = race.ratio(name)
    return f"{duration(race.median(name))}, **{digits(middle)}** ({spread(low, high)})"


def launches(race: Race) -> str:
    """Matrix products, and everything else that one run of ours launches."""
    return "{products:,} products, {others:,} others".format(**race.launches)


def size_of(nbytes: float) -> str:
    """Bytes to three digits: 412 B, 1.25 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{digits(nbytes / size)} {unit}"
    return f"{nbytes:,.0f} B"


def race_tables(races: list[Race]) -> str:
    """A table for each thing that is raced, in the order in which it was."""
    parts = []
    for what in dict.fromkeys(race.what for race in races):
        these = [race for race in races if race.what == what and len(race.seconds) > 1]
        names = list(dict.fromkeys(name for race in these for name in race.seconds))
        counted = any(race.launches for race in these)
        rows = [
            [
                race.size,
                f"{race.at:,} {race.unit}",
                str(race.threads),
                *(cell(race, name) for name in names),
                *([launches(race)] if counted else []),
            ]
            for race in sorted(these, key=lambda race: race.threads)
        ]
        if rows:
            head = ["size", "at", "threads", *names, *(["our launches"] if counted else [])]
            parts += [f"### {what}\n", table(head, rows)]
    return "\n".join(parts)


def held_tables(held: list[Held]) -> str:
    """Bytes of caches and peaks; in bold how many times ours."""
    parts = []
    for what in dict.fromkeys(one.what for one in held):
        these = [one for one in held if one.what == what]
        names = list(dict.fromkeys(name for one in these for name in one.nbytes))
        rows = []
        for one in these:
            cells = [
                f"{size_of(one.nbytes[name])}, **{digits(one.ratio(name))}**"
                if name in one.nbytes
                else ""
                for name in names[1:]
            ]
            rows.append([one.size, f"{one.at:,} {one.unit}", size_of(one.nbytes[names[0]]), *cells])
        how = ", ".join(dict.fromkeys(one.how for one in these))
        parts += [f"### {what}\n", f"Read by: {how}.\n", table(["size", "at", *names], rows)]
    return "\n".join(parts)


def growth_table(curves: list[Curve]) -> str:
    """Measured exponents beside those of the operations."""
    rows = []
    for curve in curves:
        over, last = curve.slopes(), curve.last_slopes()
        points = ", ".join(f"{at:,}" for at in curve.x)
        numbers = [f"{value:.2f}" for value in (*over, *last)]
        rows.append([curve.title, f"{points} {curve.axis}", *numbers, curve.words])
    head = ["ours", "points", "time", "operations", "time, last", "operations, last", "in words"]
    return table(head, rows)


def markdown(results: Results) -> str:
    """The whole of ``bench.md``."""
    alike = "; ".join(
        f"{size} {both[OURS]:,} and the {LLAMA}'s {both[LLAMA]:,}"
        for size, both in results.active.items()
    )
    parts = [
        "# Benchmark\n",
        f"{results.machine.line()}.\n",
        "fp32 on the CPU. Medians over rounds in which all implementations run in turn; in bold "
        "theirs over ours, the median over rounds, the smallest and the largest in brackets.\n",
        f"Weights at work on a token, embedding left out: {alike or 'not measured'}.\n",
        "## Times\n",
        race_tables(results.races),
        "## Memory\n",
        held_tables(results.held),
        "## Growth\n",
        "Exponents p of a x^p: of our time, and of the operations counted at the same points; then "
        "the same over the last interval.\n",
        growth_table(results.curves),
    ]
    if results.drafts is not None:
        parts += ["## Drafts\n", drafts_line(results) + "\n"]
    if results.notebooks is not None:
        times = results.notebooks
        verdict = "all as committed" if times.passed else "NOT all as committed"
        parts += [
            "## Notebooks\n",
            f"{times.wall:.0f} s in all, {verdict}.\n",
            table(["notebook", "seconds"], ([n, f"{s:.1f}"] for n, s in times.each.items())),
        ]
    return "\n".join(parts)


def drafts_line(results: Results) -> str:
    """Acceptance, and tokens per second both ways at the most threads."""
    drafts = results.drafts
    assert drafts is not None
    (race,) = (
        race
        for race in results.races
        if race.what == "greedy decoding" and race.threads == results.most_threads
    )
    rates = {name: drafts.tokens / race.median(name) for name in race.seconds}
    made = ", ".join(f"{name} {digits(rate)} tokens/s" for name, rate in rates.items())
    return (
        f"{drafts.accepted} of {drafts.drafted} drafts accepted "
        f"({drafts.accepted / drafts.drafted:.0%}), {drafts.steps} passes for {drafts.tokens} "
        f"tokens; {made}."
    )


def headline(results: Results) -> tuple[list[Race], list[Held]]:
    """Every race at the most threads; of what is held, the largest point."""
    raced = [r for r in results.races if r.threads == results.most_threads and len(r.seconds) > 1]
    held: dict[tuple[str, str], Held] = {}
    for one in results.held:
        kept = held.get(place := (one.what, one.size))
        if kept is None or one.at >= kept.at:
            held[place] = one
    return raced, list(held.values())


def summary(results: Results) -> str:
    """What the README shows: ours, and every other as a multiple of it."""
    races, held = headline(results)
    rows = []
    for race in races:
        others = [n for n in race.seconds if n != race.first]
        ratios = ", ".join(f"{name} {digits(race.ratio(name)[0])}" for name in others)
        rows.append([race.label, duration(race.median(race.first)), ratios])
    for one in held:
        ratios = ", ".join(f"{name} {digits(one.ratio(name))}" for name in list(one.nbytes)[1:])
        first = next(iter(one.nbytes.values()))
        rows.append([one.label, size_of(first), ratios])
    if results.notebooks is not None:
        count, wall = len(results.notebooks.each), results.notebooks.wall
        rows.append([f"{count} notebooks, executed and compared", duration(wall), ""])
    threads = "1 thread" if results.most_threads == 1 else f"{results.most_threads} threads"
    return (
        f"{results.machine.line()}; {threads}, fp32. Medians; the others as multiples of ours.\n\n"
        + table(["what", "ours", "others / ours"], rows)
    )


def put_between_markers(text: str, new: str) -> str:
    """``text`` with ``new`` in place of what stands between the markers. Raises MarkerError."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise MarkerError(
            f"README.md needs {BEGIN} and after it {END}, each once and on a line of its own; "
            "add them where the table belongs"
        )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{new.strip()}\n{END}{after}"


def publish(results: Results, out: Path, root: Path) -> None:
    """Copy figure and samples to ``figures/``, the summary into README.md. Raises MarkerError."""
    readme = root / "README.md"
    text = put_between_markers(readme.read_text(encoding="utf-8"), summary(results))
    for name in ("bench.png", "bench.json"):
        (root / "figures" / name).write_bytes((out / name).read_bytes())
    readme.write_text(text, encoding="utf-8")
