"""Package data, and the packages behind the links vila_deploy/kernels and vila_deploy/engines."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["vila_deploy*"]),
    package_data={
        "vila_deploy": ["py.typed"],
        "vila_deploy.bench.published": ["*.csv"],
        "vila_deploy.engines": ["*.toml"],
        "vila_deploy.server": ["page/*"],
        "vila_deploy.data": ["calibration/*", "evaluation/*"],
    },
)
