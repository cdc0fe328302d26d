"""The moving world: one shape over a plain ground, and what is read of its clips."""
