"""What there is to label: inputs, containers and manifests, cut into work units and read."""
