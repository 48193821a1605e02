"""The sparse ops: schema, fake kernel, autograd, autocast and the checked public function of each."""

from .conv import conv2d
from .gru import gru
from .linear import linear

__all__ = ["conv2d", "gru", "linear"]
