"""Measuring: tasks, methods and records."""
