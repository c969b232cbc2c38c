"""The stages of training, and the loop that runs their epochs."""
