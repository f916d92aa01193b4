"""A model whose weights are divided over processes (FSDP2): each holds a part of every tensor.

    weight (4096, 4096) on 2 processes     rows 0 … 2047 │ rows 2048 … 4095
    a block's forward, backward            whole for as long as it lasts, then a part again

torch's ``fully_shard`` itself, on CUDA and on the CPU (gloo), where accelerate would silently make DDP of it.
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_model(model: nn.Module, device: torch.device, n_processes: int) -> None:
    """Nothing; each process has its part of every parameter of ``model``.

    A block is a unit, and what lies around the blocks (embedding, last norm, head) is one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(device.type, (n_processes,))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module.to(device), mesh=mesh)  # one after the other: no device ever holds the whole model
    fully_shard(model.to(device), mesh=mesh)
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError("fully_shard left parameters whole")


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of ``tensor`` on the CPU; of one that is sharded every process must ask for it."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def gather_weights(model: nn.Module, *, trained_only: bool) -> dict[str, torch.Tensor]:
    """Name → the whole weight on the CPU, in process 0; every process must ask. Tied weights are one tensor.

    ``trained_only`` leaves out what is not trained, as an adapter does.
    """
    weights: dict[str, torch.Tensor] = {}
    known: dict[int, torch.Tensor] = {}
    is_main = distributed.get_rank() == 0
    for name, value in model.state_dict(keep_vars=True).items():
        if trained_only and not value.requires_grad:
            continue
        if id(value) not in known:
            whole = gather_tensor(value)
            known[id(value)] = whole if is_main else whole.new_empty(0)
        weights[name] = known[id(value)]
    return weights if is_main else {}


def spread_tensor(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``tensor`` where ``like`` lies, and this process's part of it where that is sharded; a number stays one."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of ``model`` are divided over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
