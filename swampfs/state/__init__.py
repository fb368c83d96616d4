"""This machine's durable state: catalog, cache directory, journal, sidecar. Synchronous, on the loop thread."""
