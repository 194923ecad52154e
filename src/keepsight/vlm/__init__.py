"""Where model families meet: finding visual tokens, following them through the layers."""

from keepsight.vlm.capture import Capture, capture
from keepsight.vlm.grids import ImageTokens
from keepsight.vlm.view import Vlm

__all__ = ["Capture", "ImageTokens", "Vlm", "capture"]
