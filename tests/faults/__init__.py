"""Faults in numbers that make test has no time for: ``python -m tests.faults --help``."""
