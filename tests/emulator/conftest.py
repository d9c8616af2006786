"""Tests of the emulator, and of compiled kernels on it; run `pytest tests/emulator` by itself."""

from __future__ import annotations

import os

import pytest

PLUGIN = "tests.support.emulator.plugin"
if os.environ.get("TRITON_INTERPRET") == "1":
    # Kernels are interpreted in this process, and can't be compiled any more.
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        config.pluginmanager.import_plugin(PLUGIN)
