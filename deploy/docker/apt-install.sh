#!/bin/sh
# Install packages of Debian or Ubuntu from its archive as it was at one time, so that a build gives the same versions
# again. apt checks every package by the hashes that the archive has signed.
#
# Usage: apt-install.sh SNAPSHOT PACKAGE...    (SNAPSHOT as 20261129T000000Z; empty: what the mirrors have today)
set -eu
snapshot=$1
shift
options="-o APT::Install-Recommends=false"
if [ -n "$snapshot" ]; then
    . /etc/os-release
    list=$(mktemp)
    case $ID in
        debian)
            for archive in "debian $VERSION_CODENAME" "debian $VERSION_CODENAME-updates" "debian-security $VERSION_CODENAME-security"; do
                echo "deb http://snapshot.debian.org/archive/${archive%% *}/$snapshot ${archive#* } main"
            done ;;
        ubuntu)
            for suite in "$VERSION_CODENAME" "$VERSION_CODENAME-updates" "$VERSION_CODENAME-security"; do
                echo "deb https://snapshot.ubuntu.com/ubuntu/$snapshot $suite main universe"
            done ;;
        *) echo "apt-install.sh: no snapshots of $ID are known; build with --build-arg APT_SNAPSHOT=" >&2; exit 1 ;;
    esac > "$list"
    # Old lists have run out by their own dates.
    options="$options -o Dir::Etc::SourceList=$list -o Dir::Etc::SourceParts=/dev/null -o Acquire::Check-Valid-Until=false"
fi
# shellcheck disable=SC2086  # several words
apt-get $options update
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get $options install -y "$@"
