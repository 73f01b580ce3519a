"""Tools for notebooks: engines, figures, and a count of the keys in a store."""
