"""Device kernels with a plain PyTorch truth beside each. Imports torch, never echo_ray."""
