"""GPU kernels, each beside its reference; the native backend will bring the first."""
