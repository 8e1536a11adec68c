"""A small BERT with the Trainer of Hugging Face: is a piece of text prose or code? It compresses itself.

The text is what every Python brings along: the language reference, and the source of the standard library. Where the
environment variable FXCOMPRESS_DATA names a folder with text files (text/*.txt), each of them is one class more.

Run: pip install "fxcompress[huggingface]"; python examples/huggingface_text.py
"""

import os
from pathlib import Path
from typing import Any

import torch
from pydoc_data.topics import topics
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import fxcompress as fxc
from fxcompress.adapters.huggingface import SelfCompressionCallback, TrainerModel

LENGTH = 48


def texts() -> list[str]:
    """One text for each class."""
    found = ["\n".join(topics.values())]
    library = Path(os.__file__).parent
    found.append("\n".join((library / name).read_text("utf-8") for name in ("argparse.py", "inspect.py", "typing.py")))
    folder = os.environ.get("FXCOMPRESS_DATA")
    return found + [path.read_text("utf-8") for path in sorted(Path(folder or os.devnull).glob("text/*.txt"))]


class Pieces(Dataset[dict[str, torch.Tensor]]):
    """Pieces of 48 characters, as codes 0 to 127, from the first or the last part of each text."""

    def __init__(self, sources: list[str], start: float, stop: float, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items = []
        for label, text in enumerate(sources):
            codes = torch.tensor(list(text.encode("ascii", "replace")))
            low, high = int(start * len(codes)), int(stop * len(codes)) - LENGTH
            self.items += [
                {"input_ids": codes[int(at) : int(at) + LENGTH], "labels": torch.tensor(label)}
                for at in torch.randint(low, high, (count,), generator=generator)
            ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


def accuracy(prediction: Any) -> dict[str, float]:
    """For the Trainer's evaluation."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(epochs: int = 20, folder: str = "out/huggingface", **arguments: Any) -> Trainer:
    """Train, and say what is left."""
    set_seed(0)
    sources = texts()
    train, test = Pieces(sources, 0, 0.8, 500, seed=1), Pieces(sources, 0.8, 1, 200, seed=2)
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=LENGTH, num_labels=len(sources), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    example = {name: torch.stack([train[0][name], train[1][name]]) for name in ("input_ids", "labels")}
    net = fxc.compress(BertForSequenceClassification(config), example)  # labels too: the loss is part of the graph
    optimizer = torch.optim.Adam(net.param_groups(lr=3e-3))
    trainer = Trainer(
        model=TrainerModel(net),
        args=TrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=25, logging_steps=20,
            per_device_eval_batch_size=200, eval_strategy="epoch", save_strategy="no", remove_unused_columns=False,
            lr_scheduler_type="cosine", report_to="none", use_cpu=True, disable_tqdm=True, **arguments,
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
        callbacks=[SelfCompressionCallback(target_size=0.05)],
    )  # fmt: skip
    trainer.train()
    final = net.finalize()  # a plain GraphModule: smaller, dense, no quantizers
    sizes = [entry for entry in trainer.state.log_history if "size/fractional" in entry]
    print(sizes[-1], trainer.evaluate(), sum(p.numel() for p in final.parameters()), "parameters")
    return trainer


if __name__ == "__main__":
    main()
