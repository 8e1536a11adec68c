"""Measurements behind the claims in the README and docs; ``make bench`` runs them."""
