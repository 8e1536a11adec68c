"""What a run found, for people: figures, tables and pictures."""
