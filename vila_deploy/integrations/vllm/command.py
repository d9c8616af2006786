"""The command that starts vLLM for a checkpoint."""

from __future__ import annotations

# The minor version that the plugin is for; others may differ in what it uses.
VLLM_VERSION = "0.32"
# What vLLM's --config-format and --tokenizer-mode call our code, and its model class.
MODE = "vila"
ARCHITECTURE = "VilaDeployModel"
