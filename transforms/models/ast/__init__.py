"""The Audio Spectrogram Transformer: the model and its checkpoints."""
