"""Distil a black-box teacher LLM into a small student by TAPIR, on one workstation."""

__version__ = "0.1.0"
