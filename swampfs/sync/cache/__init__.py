"""The library's sync: a whole cache directory, shared with the existing extensions, against one datastore."""
