"""What a bench says of its own rows."""


class Verdict(ValueError):
    """Something is wrong with what was measured, all of which is there."""
