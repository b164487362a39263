"""What a run's files say."""
