"""Weights that are no plain parameters: how they are made, and how they become ones."""
