"""Float networks to ternary ones: calibration from batches of inputs."""
