"""Open-Sora-Plan v1.2 as a native MODEL, CLIP and VAE of ComfyUI."""
