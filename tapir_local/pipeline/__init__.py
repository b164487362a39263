"""The stages in order: resume, redo, dry run."""
