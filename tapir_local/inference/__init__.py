"""Inference with llama.cpp: many prompts at once."""
