"""The application: commands, configuration, planning and the graph (start at ``graph``)."""

__version__ = "0.1.0"
