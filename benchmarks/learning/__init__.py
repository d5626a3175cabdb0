"""Networks that are trained: a demonstration, and the claims of the paper."""
