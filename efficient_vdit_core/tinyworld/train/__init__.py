"""How the tiny models are trained, and written in the real one's format."""
