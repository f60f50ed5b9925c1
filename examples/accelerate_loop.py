"""Accelerate: the prepared optimizer clips, so the loop has no accelerator.clip_grad_norm_."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradfuse

torch.manual_seed(0)
x = torch.randn(512, 20)
data = DataLoader(TensorDataset(x, x[:, :3].sum(dim=1, keepdim=True)), batch_size=32)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
own = gradfuse.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, clip=1.0)

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model, optimizer, data = accelerator.prepare(model, own, data)
for epoch in range(6):
    for inputs, target in data:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(inputs), target)
            accelerator.backward(loss)
            optimizer.step()  # does nothing until two batches are accumulated
            optimizer.zero_grad()
    report = own.report
    print(f"epoch {epoch}: loss {loss.item():.4f}, gradient norm {report.total_norm:.3f}")

print(own.report)
print(f"skipped steps: {own.skipped_steps}")
