"""Every key that can be set, and how defaults, YAML, --set and options join."""
