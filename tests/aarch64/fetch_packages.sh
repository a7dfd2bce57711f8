#!/usr/bin/env bash
# Unpacks Debian's aarch64 packages that kernels and their tests need into FOLDER and installs none of them: the system
# keeps its one architecture. The cross compiler and qemu-user are installed where they are missing. Does nothing where
# nothing is missing.
#
#   tests/aarch64/fetch_packages.sh FOLDER
set -euo pipefail
folder=$(realpath -m "$1")
packages=(libabsl-dev libabsl20220623 libgmock-dev libgtest-dev libhwy-dev libhwy1)

if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
  root=()
  [ "$(id -u)" -eq 0 ] || root=(sudo)
  echo "fetch_packages: installing g++-aarch64-linux-gnu qemu-user" >&2
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++-aarch64-linux-gnu qemu-user
fi
[ ! -d "$folder" ] || exit 0

# apt with state of its own, so that it knows arm64 and the system's does not.
work=$folder.partial
rm -rf "$work"
mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
options=(-o Dir::State="$work/apt" -o Dir::State::status=/dev/null -o Dir::Cache="$work/apt/cache"
         -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Acquire::Languages=none -o APT::Sandbox::User=root)
apt-get "${options[@]}" update >/dev/null
(cd "$work/apt" && apt-get "${options[@]}" download "${packages[@]}")
for package in "$work"/apt/*.deb; do dpkg-deb -x "$package" "$work"; done
rm -r "$work/apt"
mv "$work" "$folder"
