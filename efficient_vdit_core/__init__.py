"""The engine of the Efficient-vDiT node pack: plain PyTorch, independent of ComfyUI."""

__version__ = "0.1.0"
