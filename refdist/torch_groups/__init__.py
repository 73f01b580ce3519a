"""Groups of torch without global state, and collectives on them."""
