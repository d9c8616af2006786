"""From a checkpoint to an engine folder: resolve the options, plan the memory, build, finish."""
