"""Torch groups without global state, and collectives on them."""
