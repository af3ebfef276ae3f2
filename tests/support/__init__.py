"""What tests share: NumPy oracles, layer cases, backends and other processes."""
