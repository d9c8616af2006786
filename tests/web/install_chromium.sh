#!/bin/sh
# See that there is a Chromium: this computer's own, else Debian's if we are root. Exits with 1 without one.
for program in chromium chromium-browser google-chrome google-chrome-stable; do
  command -v "$program" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  limits="-o Acquire::http::Timeout=60 -o Acquire::Retries=2 -o DPkg::Lock::Timeout=120"
  # shellcheck disable=SC2086
  apt-get $limits update -qq && apt-get $limits install -qq -y --no-install-recommends chromium >/dev/null && exit 0
fi
echo "make test-web needs Chromium: install it, as with apt-get install chromium" >&2
exit 1
