"""The command ``python -m dsv3_mini.generate FOLDER``: go on with a text.

Why: after a training run one wants to read what the model writes. Begun by torchrun, all its
processes hold one model together (``parallel``), and the tokens are those of one process. Each
decides for itself, so ``--draft`` needs logits that are equal to the last digit on all of them: so
it is on a CPU; it has not been run on GPUs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dsv3_mini import job, parallel, speculative
from dsv3_mini.checkpoint import load_pretrained
from dsv3_mini.data import load_tokenizer
from dsv3_mini.environment import device
from dsv3_mini.generate import generate


def main(argv: list[str] | None = None) -> int:
    """The command ``python -m dsv3_mini.generate``; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_mini.generate",
        description="Go on with a text, greedily or by drawing.",
    )
    about = "folder of a checkpoint, as dsv3_mini.train --export writes"
    parser.add_argument("folder", type=Path, help=about)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to go on with")
    what.add_argument("--ids", help="the same as token ids, for other vocabularies: 5,17,3")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default 0, greedy)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--draft", action="store_true", help="let the MTP module guess ahead")
    args = parser.parse_args(argv)
    return job.run(lambda mesh: _run(args, mesh))


def _run(args: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    model = load_pretrained(args.folder, dtype=torch.float32, device=device(), mtp=args.draft)
    model.eval()
    tokenizer = None if args.prompt is None else _tokenizer(args.folder, model.config.vocab_size)
    if tokenizer is None:
        prompt = [_whole(part) for part in args.ids.split(",")]
    else:
        prompt = tokenizer.encode(args.prompt).ids
    if mesh is not None:
        parallel.parallelize(model, mesh)
    rest = (model, prompt, args.max_new_tokens, args.temperature, args.seed)
    tokens: Tensor
    note = ""
    if args.draft:
        tokens, fates = speculative.generate(*rest)
        note = f"\n{fates.accepted} of {fates.drafted} drafts accepted, {fates.steps} steps"
    else:
        tokens = generate(*rest)
    made: list[int] = tokens[0].tolist()
    if job.speaks(mesh):
        text = ",".join(map(str, made)) if tokenizer is None else tokenizer.decode(made)
        print(text + note)
    return 0


def _tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """The tokenizer in ``folder`` if there is one, else the package's, where it fits."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises nothing more special
            raise ValueError(
                f"{path} is damaged ({error}); fetch it again, or give --ids"
            ) from None
    tokenizer = load_tokenizer()
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"the model has {vocabulary} tokens and the package's tokenizer "
            f"{tokenizer.get_vocab_size()}; put the model's tokenizer.json into {folder}, "
            "or give --ids in place of --prompt"
        )
    return tokenizer


def _whole(part: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise ValueError(f"--ids has {part!r}; expected integers with commas, as 5,17,3") from None
