"""Measurements, never run as tests: ``scripts/bench``. Wall time is only worth something against a peer in one run."""
