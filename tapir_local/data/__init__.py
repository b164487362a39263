"""Rows in: files of every usual form, duplicates, the holdout, chat templates."""
