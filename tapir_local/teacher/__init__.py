"""Ask an endpoint, a batch API or a GGUF, through the store."""
