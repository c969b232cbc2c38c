"""What a run can be told: every key, and how defaults, YAML, --set and options join."""
