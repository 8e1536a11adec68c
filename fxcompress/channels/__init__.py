"""What channels hang together, and what is known of their values: labels, constants, segments and plans."""
