"""FSDP2 on two processes: torchrun --nproc-per-node 2 examples/fsdp2_clip.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradfuse

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
x = torch.randn(512, 20)
y = (x[:, :3].sum(dim=1) > 0).long()
model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2))
for layer in (model[0], model[2], model):
    fully_shard(layer)
optimizer = gradfuse.optim.AdamW(model.parameters(), lr=1e-2, clip=1.0)

for step in range(60):
    batch = torch.randint(len(x), (64,))[rank::size]  # each process draws the same, takes its share
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    if step == 30 and rank == 1:
        loss = loss * float("nan")  # a broken batch on one process: all skip the step
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 and rank == 0:
        norm = optimizer.report.total_norm
        print(f"step {step}: loss {loss.item():.3f}, gradient norm {norm:.3f}")

if rank == 0:
    print(f"skipped steps: {optimizer.skipped_steps}")
dist.destroy_process_group()
