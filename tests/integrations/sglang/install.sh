#!/usr/bin/env bash
# install.sh VENV PYTHON: SGLang 0.5.23 for a CPU, and this checkout, in an environment of its own.
set -Eeuo pipefail
venv=$1 python=$2
here=tests/integrations/sglang
mkdir -p "$venv"
rm -f "$venv/.skipped"
if ! "$python" -c 'import platform, sys; sys.exit(platform.machine() != "x86_64" or sys.platform != "linux")'; then
  echo "SGLang is run on Linux on x86-64 only" >"$venv/.skipped"
  exit 0
fi
trap 'echo "its environment could not be installed, as the lines above say" | tee "$venv/.skipped"; exit 0' ERR
test -x "$venv/bin/pip" || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "$(grep ^torch== constraints.txt)"
# What SGLang asks for would bring 5 GB of CUDA; torchvision's operators are declared by stand_in/.
"${pip[@]}" --no-deps sglang==0.5.23 torchvision==0.28.0 triton==3.7.1
"${pip[@]}" -r "$here/requirements.txt" pytest pytest-timeout click rich
"${pip[@]}" --no-deps -e .
