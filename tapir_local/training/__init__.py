"""Fine-tuning and the task classifier, each in a process of its own."""
