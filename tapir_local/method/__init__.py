"""The TAPIR method: pure functions without files, network or unseeded random numbers."""
