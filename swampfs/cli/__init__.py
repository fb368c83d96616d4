"""Command line: one module per group of commands. The only place that prints."""
