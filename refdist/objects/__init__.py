"""Objects in the store: how they are encoded, sent, received and gathered."""
