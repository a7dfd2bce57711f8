#!/usr/bin/env bash
# Installs what building, testing and linting Spillway needs, on Debian 12. It says what is missing before it installs it,
# does nothing where nothing is missing, and stops with the list on other systems.
set -euo pipefail

packages=(
  # tools
  cmake ninja-build g++ pkg-config python3-venv clang-format clang-tidy
  # libraries
  libabsl-dev libboost1.81-dev libcli11-dev libfmt-dev libgrpc++-dev libhwy-dev libicu-dev libpcre2-dev
  libprotobuf-dev libspdlog-dev libssl-dev libxxhash-dev libyaml-cpp-dev nlohmann-json3-dev prometheus-cpp-dev
  protobuf-compiler protobuf-compiler-grpc
  # tests and benchmarks
  libbenchmark-dev libgmock-dev libgtest-dev
)

missing=()
if command -v dpkg-query >/dev/null; then
  installed=$(dpkg-query -W -f='${db:Status-Abbrev}${Package}\n' "${packages[@]}" 2>/dev/null | sed -n 's/^ii //p' || true)
  for package in "${packages[@]}"; do
    grep -qxF "$package" <<<"$installed" || missing+=("$package")
  done
else
  missing=("${packages[@]}")
fi
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi

system=unknown
if [ -r /etc/os-release ]; then
  system=$(. /etc/os-release && echo "${ID:-unknown}-${VERSION_ID:-}")
fi
if [ "$system" != debian-12 ]; then
  echo "install-deps: this script installs packages on Debian 12 only, and this system is $system." >&2
  echo "install-deps: Spillway needs what these Debian 12 packages hold: ${missing[*]}" >&2
  exit 1
fi

root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "install-deps: neither root nor sudo. As root: apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  root=(sudo)
fi

echo "install-deps: installing ${missing[*]}" >&2
# -o Dpkg::Use-Pty=0 keeps logs readable; the package lists are fetched only where they do not know a package.
install() {
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}"
}
if ! apt-get install --simulate --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || ! install; then
  "${root[@]}" apt-get update
  install
fi
