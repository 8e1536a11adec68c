"""The demo: a network for handwritten digits that compresses itself while it trains."""
