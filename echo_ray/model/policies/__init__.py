"""Cache policies: which frame positions every tier gets in a call. Pure integers, no tensors."""
