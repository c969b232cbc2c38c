"""Resources of a process: temporary files, locks, devices, disk caches, stage times, counts."""
