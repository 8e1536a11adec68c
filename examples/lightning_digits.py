"""Handwritten digits with Lightning: a network that compresses itself, with a CSV log.

Run: pip install "fxcompress[demo,lightning]"; python examples/lightning_digits.py
"""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc
from fxcompress.adapters.lightning import SelfCompression


class Digits(L.LightningModule):
    """A small conv net; the lines with ``fxc`` and ``param_groups`` are all that is special."""

    def __init__(self) -> None:
        super().__init__()
        model = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
        self.net = fxc.compress(model, torch.zeros(2, 1, 8, 8))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """As without compression."""
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """As without compression."""
        x, y = batch
        self.log("val/accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """Bits have a learning rate and an eps of their own; it falls to 0 before that of the weights does."""
        optimizer = torch.optim.Adam(self.net.param_groups(lr=5e-3))
        scheduler = fxc.cosine(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Scikit-learn's bundled digits: three quarters to train on, one to test on."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    train, test = train_test_split(range(len(x)), test_size=0.25, random_state=0, stratify=data.target)
    first = DataLoader(TensorDataset(x[train], y[train]), batch_size=48, shuffle=True, drop_last=True)
    return first, DataLoader(TensorDataset(x[test], y[test]), batch_size=450)


def main(epochs: int = 20, folder: str = "out/lightning") -> tuple[L.Trainer, Digits]:
    """Train, and say what is left."""
    L.seed_everything(0)
    train, test = loaders()
    model = Digits()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[SelfCompression(target_size=0.04)],
        logger=CSVLogger(folder, name=None, version=""),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train, test)
    final = model.net.finalize()  # a plain GraphModule: smaller, dense, no quantizers
    shown = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
    print(shown, sum(p.numel() for p in final.parameters()), "parameters")
    return trainer, model


if __name__ == "__main__":
    main()
