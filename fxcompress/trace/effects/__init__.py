"""What code leaves behind when it runs: attributes, buffers, globals, random numbers. To see it, and to undo it."""
