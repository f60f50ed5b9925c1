"""A plain training loop: the optimizer clips in its step, and skips a step with NaN."""

import torch
from torch import nn

import gradfuse

torch.manual_seed(0)
x = torch.randn(512, 20)
y = (x[:, :3].sum(dim=1) > 0).long()
model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2))
optimizer = gradfuse.optim.AdamW(model.named_parameters(), lr=1e-2, clip=1.0)

for step in range(60):
    batch = torch.randint(len(x), (64,))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    if step == 30:
        loss = loss * float("nan")  # a broken batch: the step is skipped
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        report = optimizer.report
        print(f"step {step}: loss {loss.item():.3f}, gradient norm {report.total_norm:.3f}")

print(optimizer.report)
print(f"skipped steps: {optimizer.skipped_steps}")
