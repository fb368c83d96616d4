"""Drivers: blocking, thread-safe implementations of ``ObjectStore``. An SDK never leaves its module."""
