"""Lightning, automatic and manual optimisation. Give the Trainer no gradient_clip_val."""

import logging
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradfuse

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Automatic(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return gradfuse.optim.AdamW(self.net.named_parameters(), lr=3e-3, clip=1.0)

    def on_train_end(self) -> None:
        optimizer = self.optimizers().optimizer
        print(type(self).__name__, f"after {self.global_step} steps:", optimizer.report)
        print(f"skipped steps: {optimizer.skipped_steps}")


class Manual(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


lightning.seed_everything(0, verbose=False)
x = torch.randn(512, 20)
data = DataLoader(TensorDataset(x, (x[:, :3].sum(dim=1) > 0).long()), batch_size=64)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
for module in (Automatic(), Manual()):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=3, enable_model_summary=False, **quiet
    )
    trainer.fit(module, data)
