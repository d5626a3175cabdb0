"""From keyword arguments to an operator's tensors: the arguments, the plan, the noise, recomputation."""
