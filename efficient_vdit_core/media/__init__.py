"""Clips in files: written, and read as they are, with their sound; and the charts' SVG."""
