# vila-serve on an NVIDIA GPU, for engines of the native backend. The base is NVIDIA's CUDA image on Ubuntu 24.04;
# run it with --gpus all and the NVIDIA container toolkit.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PATH=/opt/vila/bin:$PATH
# Triton compiles small C files when it starts: that needs a compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m venv /opt/vila \
    && pip install -c constraints.txt '.[native,serve]' \
    && useradd --system --create-home --uid 10001 vila

USER 10001
WORKDIR /engine
EXPOSE 8000
ENTRYPOINT ["vila-serve", "/engine", "--host", "0.0.0.0", "--port", "8000"]
