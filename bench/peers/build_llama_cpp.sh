#!/usr/bin/env bash
# Builds llama.cpp's library, llama-bench and llama-server from the source that the pinned llama-cpp-python sdist carries,
# for this processor or with AVX2 and nothing newer, and llama_decode, which calls the library.
#
#   bench/peers/build_llama_cpp.sh [native | avx2]
set -euo pipefail
cd "$(dirname "$0")/../.."
version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
isa="${1:-native}"
case "$isa" in
  native) flags=(-DGGML_NATIVE=ON) ;;
  avx2) flags=(-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON) ;;
  *) echo "build_llama_cpp: native or avx2, not $isa" >&2; exit 2 ;;
esac

mkdir -p build/peers
archive=build/peers/llama_cpp_python-$version.tar.gz
source=build/peers/llama_cpp_python-$version/vendor/llama.cpp
if [ ! -f "$archive" ]; then
  python3 -m pip download --quiet --dest build/peers --no-deps --no-binary :all: "llama-cpp-python==$version"
fi
echo "$sha256  $archive" | sha256sum --check --quiet
[ -d "$source" ] || tar -C build/peers -xf "$archive"

# GCC 12 does not know that AMX's configuration is read whole, and drops most of what is stored to it: its matrices of
# q8_0 would end with an illegal instruction.
build=build/peers/llama-$isa
cmake -S "$source" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "${flags[@]}" \
  -DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse" -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF >"$build.configure.log"
cmake --build "$build" --target llama llama-bench llama-server
g++ -std=c++20 -O2 -Wall -Wextra bench/peers/llama_decode.cc -I"$source/include" -I"$source/ggml/include" \
  -L"$build/bin" -Wl,-rpath,'$ORIGIN' -lllama -lggml -lggml-base -o "$build/bin/llama_decode"
