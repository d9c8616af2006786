"""Reference VILA in PyTorch."""
