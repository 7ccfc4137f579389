"""Speed and memory beside PyTorch: gradients, curvature products, solves and whole erasures."""
