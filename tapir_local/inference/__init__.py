"""llama.cpp: many prompts at once."""
