"""Slow, readable twins of the library, written from docs/method.md and the paper: plain loops, no batch."""
