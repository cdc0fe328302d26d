"""The video models that the engine carries itself."""
