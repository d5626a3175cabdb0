"""Time and memory of one layer and of networks."""
