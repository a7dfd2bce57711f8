#!/usr/bin/env bash
# Packs what kernels, kvstore, engine and their tests need beyond nvcc, CMake and a C++ compiler, for a machine that can fetch
# nothing: build/gpu-carry/deps.tar.gz (git ignores build/). x86-64; the archives are this system's, and run on any system with the same
# or a newer glibc. Needs the packages of deploy/install-deps.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/gpu-carry
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$out" "$root/include" "$root/lib"
libs=/usr/lib/x86_64-linux-gnu
for header in absl gtest gmock hwy nlohmann openssl unicode pcre2.h xxhash.h xxh_x86dispatch.h; do
  cp -r "/usr/include/$header" "$root/include/"
done
cp -r "/usr/include/x86_64-linux-gnu/openssl" "$root/include/"  # configuration.h lives with the architecture
cp "$libs"/libabsl_*.a "$root/lib/"
for name in gtest gmock gtest_main crypto icuuc icudata pcre2-8; do cp "$libs/lib$name.a" "$root/lib/"; done
cp -L "$libs/libhwy.so.1" "$libs/libxxhash.so.0" "$root/lib/"  # no archive, or without run-time dispatch
ln -s libhwy.so.1 "$root/lib/libhwy.so"
ln -s libxxhash.so.0 "$root/lib/libxxhash.so"
# The golden model, beside the checkout here, travels inside.
if [ -d ../shared/models/stories260K ]; then
  mkdir -p "$root/shared/models" && cp -r ../shared/models/stories260K "$root/shared/models/"
fi
tar -C "$root" -czf "$out/deps.tar.gz" .
du -h "$out/deps.tar.gz"
