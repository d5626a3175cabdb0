"""What is measured of asgl_cuda, each a module that is run by `python -m`."""
