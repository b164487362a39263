"""Read rows from files in all common formats, remove duplicates, split off the holdout, render chat templates."""
