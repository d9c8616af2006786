#!/usr/bin/env bash
# install.sh VENV PYTHON: Triton Inference Server, out of nvidia-pytriton, and what our engines need.
set -Eeuo pipefail
venv=$1 python=$2
mkdir -p "$venv"
rm -f "$venv/.skipped"
if [[ $(uname -sm) != "Linux x86_64" ]]; then
  echo "nvidia-pytriton has a server for Linux on x86-64 alone, this is $(uname -sm)" | tee "$venv/.skipped"
  exit 0
fi
trap 'echo "its environment could not be installed, as the lines above say" | tee "$venv/.skipped"; exit 0' ERR
test -x "$venv/bin/pip" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
# The server's Python stub was built against numpy 1 and dies with numpy 2.
pip install nvidia-pytriton==0.7.0 numpy==1.26.4 pillow click rich tokenizers sentencepiece flatbuffers protobuf
pip install --no-deps "$(grep ^onnxruntime== constraints.txt)"
