"""Packaging: `kernels/` and `engines/` lie at the top level and install as vila_deploy.kernels and vila_deploy.engines."""

from setuptools import find_packages, setup

COMMANDS = {
    "vila-quantize": "quantize",
    "vila-build-engine": "build_engine",
    "vila-chat": "chat",
    "vila-bench": "bench",
}

setup(
    packages=[*find_packages(include=["vila_deploy*"]), "vila_deploy.kernels", "vila_deploy.engines"],
    package_dir={"vila_deploy.kernels": "kernels", "vila_deploy.engines": "engines"},
    package_data={
        "vila_deploy": ["py.typed"],
        "vila_deploy.engines": ["*.toml"],
        "vila_deploy.quantize": ["calibration/*"],
    },
    entry_points={
        "console_scripts": [
            f"{command}=vila_deploy.cli.{module}:main" for command, module in COMMANDS.items()
        ]
    },
)
