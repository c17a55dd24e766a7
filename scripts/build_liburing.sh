#!/usr/bin/env bash
# Builds and installs liburing where the distribution's is too old or missing: cibuildwheel runs it in
# the manylinux image before the wheels, which then carry that library inside. Needs root.
#
#   scripts/build_liburing.sh [PREFIX]
#
# AlmaLinux 8, which manylinux_2_28 is made of, has no liburing of 2.2 or newer.
set -euo pipefail

version=2.9
sha256=897b1153b55543e8b92a5a3eb9b906537a5fedcf8afaf241f8b8787940c79f8d
prefix=${1:-/usr}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
curl --fail --silent --show-error --location --output liburing.tar.gz \
    "https://github.com/axboe/liburing/archive/refs/tags/liburing-$version.tar.gz"
echo "$sha256  liburing.tar.gz" | sha256sum --check --quiet
tar -xzf liburing.tar.gz --strip-components 1
./configure --prefix="$prefix" --libdir="$prefix/lib64" --libdevdir="$prefix/lib64"
# The library alone: its tests and examples want newer kernel headers.
make -C src -j"$(nproc)"
make -C src install
make liburing.pc
install -D -m 644 liburing.pc "$prefix/lib64/pkgconfig/liburing.pc"
