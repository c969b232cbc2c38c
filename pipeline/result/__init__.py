"""A result folder: its state, its lock, and what is made of it."""
