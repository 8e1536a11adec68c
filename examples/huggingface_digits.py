"""A small vision transformer for handwritten digits, with the Trainer of Hugging Face: it compresses itself.

Run: pip install "fxcompress[demo,huggingface]"; python examples/huggingface_digits.py
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import fxcompress as fxc
from fxcompress.adapters.huggingface import SelfCompressionCallback, TrainerModel

Samples = list[dict[str, Tensor]]


def samples() -> tuple[Samples, Samples]:
    """Scikit-learn's bundled digits: three quarters to train on, one to test on."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    train, test = train_test_split(range(len(x)), test_size=0.25, random_state=0, stratify=data.target)
    return [{"pixel_values": x[i], "labels": y[i]} for i in train], [
        {"pixel_values": x[i], "labels": y[i]} for i in test
    ]


def accuracy(prediction: Any) -> dict[str, float]:
    """For the Trainer's evaluation."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(epochs: int = 30, folder: str = "out/huggingface", **arguments: Any) -> Trainer:
    """Train, and say what is left."""
    set_seed(0)
    train, test = samples()
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, num_labels=10, initializer_range=0.1,
    )  # fmt: skip
    example = {name: torch.stack([train[0][name], train[1][name]]) for name in train[0]}  # labels too: for the loss
    net = fxc.compress(ViTForImageClassification(config), example)
    optimizer = torch.optim.Adam(net.param_groups(lr=5e-3))
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 48, "per_device_eval_batch_size": 450, "lr_scheduler_type": "cosine",
        "logging_steps": 10, "eval_strategy": "epoch", "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
    }  # fmt: skip
    trainer = Trainer(
        model=TrainerModel(net),
        args=TrainingArguments(output_dir=folder, num_train_epochs=epochs, **(settings | arguments)),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
        callbacks=[SelfCompressionCallback(target_size=0.04)],
    )
    trainer.train()
    final = net.finalize()  # a plain GraphModule: smaller, dense, no quantizers
    print(trainer.evaluate(), sum(p.numel() for p in final.parameters()), "parameters")
    return trainer


if __name__ == "__main__":
    main()
