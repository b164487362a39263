"""TAPIR itself: pure functions without files, network or unseeded chance."""
