"""One SQLite file that holds every paid call."""
