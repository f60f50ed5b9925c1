"""Hugging Face Trainer: max_grad_norm=0 turns its clip off; the optimizer clips in its step."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, logging
from transformers.trainer_callback import PrinterCallback

import gradfuse

logging.set_verbosity_error()


class Counting(Dataset):
    """Sequences that count up, modulo 50."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index) % 50
        return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
config = GPT2Config(
    vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config)
optimizer = gradfuse.optim.AdamW(model.named_parameters(), lr=3e-3, clip=1.0)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=40,
        per_device_train_batch_size=16,
        max_grad_norm=0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Counting(), optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()

print(f"{result.global_step} steps, mean loss {result.training_loss:.3f}")
print(optimizer.report)
print(f"skipped steps: {optimizer.skipped_steps}")
