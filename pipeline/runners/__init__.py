"""Beam runners: Dataflow, and those behind a job service."""
