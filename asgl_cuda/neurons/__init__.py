"""The neurons, one file each: the function, its autograd Function, and the layer."""
