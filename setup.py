"""Packaging that pyproject.toml can't express: `kernels/` and `engines/` lie at the top level.

They install as vila_deploy.kernels and vila_deploy.engines.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["vila_deploy*"]),
        "vila_deploy.kernels",
        "vila_deploy.engines",
    ],
    package_dir={"vila_deploy.kernels": "kernels", "vila_deploy.engines": "engines"},
    package_data={
        "vila_deploy": ["py.typed"],
        "vila_deploy.engines": ["*.toml"],
        "vila_deploy.quantize": ["calibration/*", "evaluation/*"],
    },
)
