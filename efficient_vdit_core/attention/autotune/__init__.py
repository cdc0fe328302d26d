"""Which backend is fastest here: measured once, and kept."""
