#!/bin/sh
# See that there is a Chromium: this computer's own, else Debian's if we are root.
for program in chromium chromium-browser google-chrome google-chrome-stable; do
  command -v "$program" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null && exit 0
fi
echo "make test-web needs Chromium: install it, as with apt-get install chromium" >&2
exit 1
