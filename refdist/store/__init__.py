"""The store: a client of it, its keys, the seals on its values, and where it listens."""
