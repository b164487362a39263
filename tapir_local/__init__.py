"""Distill a black-box teacher LLM into a small student with TAPIR, on one workstation."""

__version__ = "0.1.0"
