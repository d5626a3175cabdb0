"""Training with neuron layers: schedules, monitoring, calibration, helpers of the loop."""
