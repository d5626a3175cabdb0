"""The definition of what is computed, in plain PyTorch; imports nothing compiled."""
