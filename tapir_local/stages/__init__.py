"""What each stage reads, does and writes."""
