"""What is wrong with this machine for a recipe."""
