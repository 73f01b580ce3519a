"""The store: a client of it, its keys, the tags on its values, and where it listens."""
