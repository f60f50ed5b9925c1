"""Mixed precision: unscaling, clipping and the check for inf all happen in scaler.step."""

import torch
from torch import nn

import gradfuse

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(512, 20, device=device)
y = x[:, :3].sum(dim=1, keepdim=True)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
optimizer = gradfuse.optim.AdamW(model.parameters(), lr=3e-3, clip=1.0)
scaler = torch.amp.GradScaler(device, init_scale=2.0**24)  # too large: the first steps overflow

for step in range(60):
    batch = torch.randint(len(x), (64,), device=device)
    with torch.autocast(device, dtype=torch.float16):
        prediction = model(x[batch])
    loss = nn.functional.mse_loss(prediction.float(), y[batch])
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # no scaler.unscale_, no clip_grad_norm_
    scaler.update()
    if step % 20 == 19:
        norm = optimizer.report.total_norm  # of the unscaled gradients
        print(f"step {step}: loss {loss.item():.3f}, gradient norm {norm:.3f}")

print(f"loss scale {scaler.get_scale():g}, skipped steps: {optimizer.skipped_steps}")
