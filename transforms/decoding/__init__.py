"""Encoded bytes to samples: libsndfile and FFmpeg, in child processes that can be killed."""
