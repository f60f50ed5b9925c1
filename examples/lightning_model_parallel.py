"""Lightning on two processes: torchrun --nproc-per-node 2 examples/lightning_model_parallel.py

ModelParallelStrategy's gradient_clip_val calls torch's function; this hook calls ours.
"""

import logging
import warnings

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import gradfuse

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2))

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_gradient_clipping(self, optimizer, **_) -> None:
        self.norm = gradfuse.clip_grad_norm_(self.net.parameters(), 0.1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=3e-3)

    def on_train_end(self) -> None:
        if self.global_rank == 0:
            print(f"after {self.global_step} steps: gradient norm {self.norm.item():.3f}")


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(512, 20)
    data = DataLoader(TensorDataset(x, (x[:, :3].sum(dim=1) > 0).long()), batch_size=64)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=3,
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(Classifier(), data)
