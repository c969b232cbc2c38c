"""Tables that list what to label: their texts, their columns, and the layouts of other tools."""
