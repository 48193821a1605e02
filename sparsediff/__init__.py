"""Training of truly sparse diffusion models: models, data sets, methods, the loop and its command line."""

__version__ = "0.1.0"
