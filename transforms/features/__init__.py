"""Samples to the model's input: windows, Kaldi filter banks, their statistics."""
