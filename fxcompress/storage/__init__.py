"""Networks on disk, with each weight in the bits that it needs."""
