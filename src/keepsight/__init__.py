"""keepsight: see how much of a picture survives inside a multimodal LLM, and train the model to keep it."""

__version__ = "0.1.0"
