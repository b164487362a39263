"""The embedded teacher and its world of tasks."""
