"""What both Flax front ends share: dimension numbers, the forward pass, the coverage table."""
