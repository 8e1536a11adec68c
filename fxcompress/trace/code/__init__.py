"""The code of a model as Python has it: whose it is, where it stands, which functions there are, what they name."""
