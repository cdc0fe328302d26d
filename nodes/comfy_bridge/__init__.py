"""The only place that imports ComfyUI's own modules; everything version-dependent is in here."""
