"""torchtitan's clip call: torchrun --nproc-per-node 2 examples/torchtitan_clip.py

torchtitan trains with torchtitan.distributed.utils.clip_grad_norm_(parameters, max_norm, ...,
pp_mesh=...), which takes a norm for each mesh dimension. One call takes its place.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import gradfuse


def clip_grad_norm_(
    parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    ep_enabled: bool = False,  # meshes of experts need nothing: all take part in one norm
) -> torch.Tensor:
    """In place of torchtitan.distributed.utils.clip_grad_norm_."""
    group = None if pp_mesh is None else pp_mesh.get_group()
    return gradfuse.clip_grad_norm_(
        list(parameters), max_norm, norm_type, error_if_nonfinite, foreach, group=group
    )


dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(1 + dist.get_rank())
for step in range(60):
    x = torch.randn(32, 20)
    nn.functional.mse_loss(model(x), x[:, :1]).backward()
    norm = clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 and dist.get_rank() == 0:
        print(f"step {step}: gradient norm {norm.item():.3f}")
dist.destroy_process_group()
