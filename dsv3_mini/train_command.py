"""The command ``python -m dsv3_mini.train``: long runs that can be stopped and resumed.

Why apart from ``train``: the loop is a library that notebooks use; the command adds a folder, a
progress bar and the handling of Ctrl-C, and needs tqdm for it.

    torchrun --standalone --nproc-per-node 4 -m dsv3_mini.train --out runs/four --steps 2000

trains the same model by four processes (``parallel``): same losses. Its saves are in slices, which
only torchrun goes on with; ``--export`` writes an ordinary checkpoint. After Ctrl-C torchrun gives
the ranks 30 seconds to finish the step and to save it.

A second command in the folder of one that still runs is refused.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import signal
from contextlib import nullcontext
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from dsv3_mini import job, parallel
from dsv3_mini.checkpoint import save_pretrained
from dsv3_mini.config import ConfigError, ModelConfig
from dsv3_mini.data import load_corpus
from dsv3_mini.environment import device
from dsv3_mini.parallel_run import ParallelRun
from dsv3_mini.resume import Run, hold
from dsv3_mini.train import TrainConfig, evaluate, train, train_step


def main(argv: list[str] | None = None) -> int:
    """The command ``python -m dsv3_mini.train``; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_mini.train",
        description="Train on the text of this machine; the same words again resume the run.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--preset", choices=("tiny", "mini", "gpu"), default="mini")
    parser.add_argument("--layers", type=int, help="main layers (default: the preset's)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saves")
    parser.add_argument("--export", type=Path, help="at the end write bf16 weights alone here")
    parser.add_argument("--characters", type=int, default=400_000, help="of text per domain")
    parser.add_argument("--fp8", action="store_true", help="multiply in FP8 (emulated on a CPU)")
    for field in dataclasses.fields(TrainConfig):
        if field.name == "fp8":
            continue
        kind = int if field.type == "int" else float
        flag = "--" + field.name.replace("_", "-")
        about = f"(default {field.default})"
        parser.add_argument(flag, type=kind, default=field.default, help=about)
    args = parser.parse_args(argv)
    return job.run(lambda mesh: _run(args, mesh))


def _run(args: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    if args.save_every < 1:
        raise ConfigError(f"--save-every is {args.save_every}; expected at least 1")
    if args.export is not None and args.export.exists() and any(args.export.iterdir()):
        raise ConfigError(f"--export {args.export} is not empty; choose a new folder")
    with hold(args.out) if job.speaks(mesh) else nullcontext():
        return _train(args, mesh)


def _train(args: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    first = job.speaks(mesh)
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: getattr(args, name) for name in names})
    corpus = load_corpus(characters=args.characters)
    model_config: ModelConfig = getattr(ModelConfig, args.preset)()
    layers = model_config.num_hidden_layers if args.layers is None else args.layers
    model_config = model_config.replace(vocab_size=corpus.vocab_size, num_hidden_layers=layers)
    run: Run
    if mesh is None:
        run, step = Run.open(args.out, model_config, config, corpus, device()), train_step
    else:
        run = ParallelRun.join(args.out, model_config, config, corpus, mesh)
        step = parallel.train_step
    # A first Ctrl-C ends the run after the current step and saves it.
    signals: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    stopped = False
    bar = tqdm(total=config.steps, initial=run.state.step, unit="step", disable=not first)
    for record in train(run.model, corpus, config, run.state, step=step):
        run.log(record)
        bar.update()
        bar.set_postfix(loss=f"{record.loss:.3f}", maxvio=f"{max(record.max_violation):.2f}")
        stopped = run.anyone(bool(signals))
        if stopped or record.step % args.save_every == 0 or record.step == config.steps:
            run.save()
        if stopped:
            break
    bar.close()
    for domain in () if stopped else corpus.domains:
        held_out = evaluate(run.model, corpus.windows(domain, config.seq_len, 32))
        if first:
            print(f"{domain:12s} held-out loss {held_out:.3f} nats per token")
    if args.export is not None and not stopped:
        whole = copy.deepcopy(run.model) if mesh is None else parallel.gather_model(run.model)
        if first:
            save_pretrained(whole.bfloat16(), args.export)
            print(f"exported to {args.export}")
    if first:
        print(f"step {run.state.step} of {config.steps} saved in {run.latest}")
    return 130 if stopped else 0
