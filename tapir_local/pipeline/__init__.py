"""The stages of a run in order: run, resume, redo, dry run."""
