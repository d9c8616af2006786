# vila-serve on a Jetson Orin, for engines of the tensorrt backend. The base is NVIDIA's TensorRT image for JetPack 6,
# with the board's TensorRT 10.3 and Python 3.10; run it with --runtime nvidia. Packages are those of docs/orin.md.
FROM nvcr.io/nvidia/l4t-tensorrt:r10.3.0-runtime

ENV PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY . .
# hadolint ignore=DL3013
RUN pip install -U 'click>=8.2' 'pillow>=11' rich numpy tokenizers sentencepiece tomli cuda-bindings==12.8.0 \
      'llguidance>=1.7' 'prometheus-client>=0.22' 'starlette>=1.0' 'uvicorn>=0.40' \
    && pip install --no-deps --ignore-requires-python . \
    && useradd --system --create-home --uid 10001 vila

USER 10001
WORKDIR /engine
EXPOSE 8000
ENTRYPOINT ["vila-serve", "/engine", "--host", "0.0.0.0", "--port", "8000"]
