"""One model on several processes: experts spread over ranks, all other weights in slices.

Why: V3's routed experts are 97 % of its weights, far more than one card holds, and a token uses
8 of 256. So the *tokens* travel. Each rank has its own rows of the batch and E / R experts of every
MoE layer; a layer sends tokens to the ranks of their experts (dispatch), and gets answers back
(combine). Each is an all-to-all, and its backward pass is the same all-to-all turned around.
A token with several experts on a rank goes there once, and the rank returns one weighted sum
(report 3.2.2 does so per node); so a token goes to ``topk_group`` of the R ranks at most, where
there are as many groups as ranks. Nothing is dropped, however lopsided the routing.

What is left, 3 % of the weights, every token needs on every rank: FSDP2 keeps a slice of each on
every rank, gathers a layer's just before its use, and averages gradients into slices. The report
has ZeRO-1 and 16 pipeline stages in its place, and overlaps traffic with work (3.2.1); not here.

Losses are means over rows, and all ranks have equally many: the mean over ranks of a gradient is
the whole batch's. An expert's gradient is a sum over the tokens of all ranks, thus divided by R.
Every parameter is a DTensor, so clipping, AdamW and ``train.train_step`` are those of one process.

    mesh = start()                                 # in a script begun by torchrun
    model = Transformer(config)
    parallelize(model, mesh)
    state = new_state(model, settings)             # after parallelize: it needs the slices
    record = train_step(model, state, settings, [tokens_of_all_ranks])
    stop()

Legend: R ranks, N tokens here, D hidden, E experts, L experts on a rank, K chosen, F expert width,
S rows sent, M rows received. A row is a token on its way to a rank.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.checkpoint import state_dict, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from dsv3_mini import train
from dsv3_mini.balance import update_bias
from dsv3_mini.model import Transformer
from dsv3_mini.moe import Experts
from dsv3_mini.train import Record, Rule, TrainConfig, TrainState


def start(device: str | None = None) -> DeviceMesh:
    """Join the other processes of this job: a mesh of all its ranks, (R,).

    ``device`` is 'cpu' (gloo) or 'cuda' (NCCL, a card a process; not yet run on a GPU), by default
    whichever there is. Raises ValueError in a process that torchrun did not start.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"{', '.join(missing)} not set, so this process is not a rank of a job; start it by: "
            "torchrun --standalone --nproc-per-node 2 YOUR_SCRIPT.py"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("ranks",))


def stop() -> None:
    """Leave the job, when all ranks have come here: the last call of a script."""
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads let go of the last tensors a moment later; with Python gone, they would abort.
    time.sleep(0.2)


class ParallelExperts(Experts):
    """``Experts`` of which this rank holds L = E / R neighbours; ``parallelize`` makes it.

    ``gate_proj`` and the others are DTensors of the same shape as before, split along E.
    """

    mesh: DeviceMesh
    sent_R: Tensor
    """Bytes dispatched from here to each rank since ``parallelize``, int64."""

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """What ``Experts.forward`` gives for this rank's tokens, (N, D), with everyone's experts.

        All ranks have to call it, N may be 0. A token's K experts differ. Source: report 3.2.2.
        """
        ranks, experts = self.mesh.size(), self.gate_proj.shape[0]
        gates_NE = x_ND.new_zeros(len(x_ND), experts)
        gates_NE = gates_NE.scatter(1, indices_NK, weights_NK.to(x_ND.dtype))
        # Apart from the gates: a chosen expert's may be 0, and still wants its gradient.
        chosen_NE = torch.zeros_like(gates_NE).scatter(1, indices_NK, 1.0)
        travel_NRL = [t_NE.unflatten(1, (ranks, -1)) for t_NE in (gates_NE, chosen_NE)]
        goes_NR = travel_NRL[1].any(dim=-1)
        rank_S, token_S = goes_NR.T.nonzero(as_tuple=True)  # sorted by rank
        rows = torch.cat([x_ND[token_S], *(t[token_S, rank_S] for t in travel_NRL)], dim=1)
        out_R = goes_NR.sum(dim=0)
        in_R = torch.empty_like(out_R)
        dist.all_to_all_single(in_R, out_R, group=self.mesh.get_group())
        out, back = out_R.tolist(), in_R.tolist()
        self.sent_R += out_R.cpu() * rows.shape[1] * rows.element_size()
        arrived = all_to_all_single_autograd(rows, back, out, self.mesh)
        parts = arrived.split([x_ND.shape[1], experts // ranks, experts // ranks], dim=1)
        answers_SD = all_to_all_single_autograd(self.local(*parts), out, back, self.mesh)
        return torch.zeros_like(x_ND).index_add(0, token_S, answers_SD)

    def local(self, x_MD: Tensor, gates_ML: Tensor, chosen_ML: Tensor) -> Tensor:
        """This rank's experts on what arrived: (M, D), a row's chosen ones weighted and summed."""
        expert, row = chosen_ML.T.nonzero(as_tuple=True)  # sorted by expert
        sizes = chosen_ML.count_nonzero(dim=0).tolist()
        chunks = zip(x_MD[row].split(sizes), gates_ML[row, expert, None].split(sizes), strict=True)
        weights = (_local(p).unbind() for p in (self.gate_proj, self.up_proj, self.down_proj))
        # Also over empty chunks: an idle expert has a gradient of 0, and its weights decay.
        outs = [
            self._swiglu(*chunk, *parts) for chunk, *parts in zip(chunks, *weights, strict=True)
        ]
        return torch.zeros_like(x_MD).index_add(0, row, torch.cat(outs))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """Spread a finished model over the mesh, in place; rank 0's weights are everyone's.

    Every rank builds the whole model first, so the largest model is what one process can hold.
    Raises ValueError if the experts do not divide by the ranks, or if it was done before.
    """
    ranks, experts = mesh.size(), model.config.n_routed_experts
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    if layers and experts % ranks:
        raise ValueError(
            f"n_routed_experts {experts} does not divide by {ranks} ranks; change it, or start "
            f"torchrun with --nproc-per-node {max(r for r in range(1, ranks) if experts % r == 0)}"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("the model is parallel already; expected one as Transformer makes it")
    model.to(mesh.device_type)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)
    for module in layers:
        _split(module, mesh)
    kept = {parameter for module in layers for parameter in module.parameters()}
    # MTP's layers read these two as well: the root gathers them, once, for all.
    shared = {*model.model.embed_tokens.parameters(), *model.lm_head.parameters()}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=kept | shared)
    fully_shard(model, mesh=mesh, ignored_params=kept)


def _split(module: Experts, mesh: DeviceMesh) -> None:
    module.__class__ = ParallelExperts  # the same object: a changed ``linear`` stays
    assert isinstance(module, ParallelExperts)
    module.mesh, module.sent_R = mesh, torch.zeros(mesh.size(), dtype=torch.int64)
    for name, parameter in list(module.named_parameters()):
        mine = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
        whole = nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False))
        # The loss of each rank is a mean over its own rows; of the batch, over all R times more.
        whole.register_hook(lambda gradient: gradient / mesh.size())
        setattr(module, name, whole)


def train_step(
    model: Transformer, state: TrainState, config: TrainConfig, batches: list[Tensor],
    rule: Rule = update_bias,
) -> Record:  # fmt: skip
    """``train.train_step`` by all ranks together: the same arguments, and the same Record.

    ``batches`` are the whole ones, (B, T + 1), the same on every rank, which takes its own B / R
    rows. Losses are means over ranks, counts sums, seconds this rank's. Source: report 4.2.
    Raises ValueError if a batch does not divide by the ranks, or if ``alpha_batch`` is not 0.
    """
    if config.alpha_batch:
        raise ValueError(
            f"alpha_batch is {config.alpha_batch}; expected 0 where several processes train: that "
            "loss is no mean over rows, and would need the scores of all ranks"
        )
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for tokens in batches:
        if len(tokens) % ranks:
            raise ValueError(
                f"a batch of {len(tokens)} rows does not divide by {ranks} ranks; expected a "
                f"multiple, as batch_size {-(-len(tokens) // ranks) * ranks}: means would differ"
            )

    def whole_batch(bias_E: Tensor, load_E: Tensor, gamma: float) -> Tensor:
        dist.all_reduce(load_E)  # in place, so that the record has the sums, too
        return rule(bias_E, load_E, gamma)

    rows = [tokens.chunk(ranks)[rank] for tokens in batches]
    record = train.train_step(model, state, config, rows, whole_batch)
    losses = [record.loss, record.balance_loss, *record.mtp_losses]
    mean = torch.tensor(losses, dtype=torch.float64, device=batches[0].device)
    dist.all_reduce(mean)
    loss, balance_loss, *mtp_losses = (mean / ranks).tolist()
    return dataclasses.replace(
        record, loss=loss, balance_loss=balance_loss, mtp_losses=tuple(mtp_losses),
        tokens=record.tokens * ranks,
    )  # fmt: skip


def traffic(model: Transformer) -> Tensor:
    """Bytes dispatched so far from rank (row) to rank (column), by MoE layer: (layers, R, R) int64.

    Counted at the all-to-all. A row of the dispatch is D + 2 L numbers: the token, and a gate and a
    mark for each expert there. Combine sends D numbers for each, the other way; the backward pass
    repeats both, each turned around. The diagonal stays on its rank. All ranks have to call it.
    Raises ValueError for a model without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, ParallelExperts)]
    if not layers:
        raise ValueError("no layer has spread experts; call parallelize first")
    mine = torch.stack([module.sent_R for module in layers]).to(layers[0].mesh.device_type)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone, dim=1).cpu()


def gather(model: Transformer) -> dict[str, Tensor]:
    """The state dict of the model on one process, on every rank; all have to call it."""
    options = state_dict.StateDictOptions(full_state_dict=True)
    whole = state_dict.get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in whole.items() if isinstance(tensor, Tensor)}


def gather_model(model: Transformer) -> Transformer:
    """An ordinary model with the weights of a parallel one, on the CPU of every rank."""
    whole = Transformer(model.config)
    whole.load_state_dict({name: tensor.cpu() for name, tensor in gather(model).items()})
    return whole


def save(folder: str | os.PathLike[str], model: Transformer, state: TrainState) -> None:
    """Write model and optimizer to a new ``folder``, each rank its own part.

    Written beside it and renamed when complete. All ranks have to call it, on a file system that
    they share. Raises ValueError if there is such a folder.
    """
    target = Path(folder)
    beside = target.with_name(f".{target.name}.writing")
    if target.exists():
        raise ValueError(f"{target} exists; expected a new folder for each save, as step-000100")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)  # left by a kill in the middle of a save
    dist.barrier()
    try:
        state_dict_saver.save(_everything(model, state), checkpoint_id=beside)
    except CheckpointException as error:
        raise ValueError(f"cannot save into {target}: {_reason(error)}") from None
    if dist.get_rank() == 0:
        beside.rename(target)
    dist.barrier()


def load(folder: str | os.PathLike[str], model: Transformer, state: TrainState) -> None:
    """Put what ``save`` wrote into a parallel model and its fresh state. Raises ValueError.

    Load only your own saves: the index of torch.distributed.checkpoint is a pickle.
    With equally many ranks, on a CPU, training goes on bit for bit as if it had never stopped.
    Another number of ranks can load it, too.
    """
    if not (Path(folder) / ".metadata").is_file():
        raise ValueError(f"{folder} holds no complete save; expected one that parallel.save wrote")
    found = _everything(model, state)
    try:
        state_dict_loader.load(found, checkpoint_id=folder)
    except CheckpointException as error:
        raise ValueError(f"{folder} does not fit this model: {_reason(error)}") from None
    state_dict.set_state_dict(
        model, state.optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )
    state.step = found["step"]


def _reason(error: CheckpointException) -> str:
    reason, _ = next(iter(error.failures.values()))
    return str(reason)


def _everything(model: Transformer, state: TrainState) -> dict[str, Any]:
    weights, moments = state_dict.get_state_dict(model, state.optimizer)
    return {"model": weights, "optimizer": moments, "step": state.step}
