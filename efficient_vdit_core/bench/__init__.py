"""What `evdit bench` measures. Every result names hardware, versions, shapes, seed and command."""
