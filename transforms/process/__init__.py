"""What one process has: temporary files, locks, devices, disk caches, clocks and counts."""
