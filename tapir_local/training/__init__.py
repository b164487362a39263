"""Fine-tuning and the task classifier, each in its own process."""
