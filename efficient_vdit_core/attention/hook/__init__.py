"""A running model's attention made sparse: prepared before a forward, decided call by call."""
