"""A model as GGUF, and the proof that it is the same model."""
