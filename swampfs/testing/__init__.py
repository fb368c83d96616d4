"""Shipped test support: a sample datastore to try things on."""
