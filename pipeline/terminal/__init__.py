"""What commands print: progress, logs, time and precision reports; the standard streams."""
