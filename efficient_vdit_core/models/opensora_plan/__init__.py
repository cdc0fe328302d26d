"""Open-Sora-Plan v1.2: diffusion transformer, causal video VAE, mT5 text encoder and their checkpoints."""
