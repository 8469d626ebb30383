#!/usr/bin/env bash
# Installs what tests need besides Python packages, where it may: as root, with apt. Elsewhere it says what to install.
# It asks apt nothing when all is there, and never fails: tests that lack something are skipped and say why.
set -u
export PATH="$PATH:/usr/sbin:/usr/local/sbin" DEBIAN_FRONTEND=noninteractive

has_object_server() { command -v nginx && compgen -G '/usr/*/nginx/modules/ngx_http_dav_ext_module.so'; }
has_browser() { command -v chromedriver && { command -v chromium || command -v google-chrome; }; }
has_network_tools() { command -v ip && command -v tc; }
# Not where there is InfiniBand: the package starts OpenSM, which would manage that fabric.
has_infiniband_simulator() { [ -e /sys/class/infiniband_mad ] || { command -v ibsim && command -v opensm; }; }

declare -A packages=(
  [object_server]="nginx-light libnginx-mod-http-dav-ext"
  [browser]="chromium chromium-driver fonts-dejavu-core"
  [network_tools]="iproute2"
  [infiniband_simulator]="ibsim-utils opensm infiniband-diags"
)
missing=()
for part in "${!packages[@]}"; do "has_$part" >/dev/null || missing+=("$part"); done
((${#missing[@]})) || exit 0

apt=(apt-get -qq -o DPkg::Lock::Timeout=60)
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "tests: installing ${missing[*]} (at most a few minutes, once)"
  timeout -k 10 90 "${apt[@]}" update >/dev/null || echo "tests: apt-get update failed; trying with what is known"
  for part in "${missing[@]}"; do
    # shellcheck disable=SC2086  # package names are words
    timeout -k 10 300 "${apt[@]}" install -y --no-install-recommends ${packages[$part]} >/dev/null
  done
fi
for part in "${missing[@]}"; do
  "has_$part" >/dev/null || echo "tests: no ${part/_/ }, its tests are skipped; as root: apt-get install ${packages[$part]}"
done
