"""Accelerate's FSDP2: torchrun --nproc-per-node 2 examples/accelerate_fsdp.py

accelerator.clip_grad_norm_ calls torch's function with DTensors. gradfuse.clip_grad_norm_ takes its
place where gradients are synchronised.
"""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradfuse

torch.manual_seed(0)
x = torch.randn(512, 20)
data = DataLoader(TensorDataset(x, x[:, :3].sum(dim=1, keepdim=True)), batch_size=32)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
own = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model, optimizer, data = accelerator.prepare(model, own, data)
for epoch in range(6):
    for inputs, target in data:
        loss = nn.functional.mse_loss(model(inputs), target)
        accelerator.backward(loss)
        if accelerator.sync_gradients:  # not accelerator.clip_grad_norm_
            norm = gradfuse.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}, gradient norm {norm.item():.3f}")
accelerator.end_training()
