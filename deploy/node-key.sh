#!/usr/bin/env bash
# Make the key pair by which a SuperNode proves who it is.
#   deploy/node-key.sh DIR NAME
# DIR/NAME stays at the node; DIR/NAME.pub goes to the SuperLink's operator, who registers
# it: flwr supernode register NAME.pub CONNECTION --name NAME
set -euo pipefail
umask 077
[ $# -eq 2 ] || { echo "usage: $0 DIR NAME" >&2; exit 2; }
command -v ssh-keygen >/dev/null || { echo "error: ssh-keygen is missing; install openssh-client" >&2; exit 2; }
mkdir -p "$1"
[ ! -e "$1/$2" ] || { echo "error: $1/$2 is there already; a node keeps its key" >&2; exit 2; }
ssh-keygen -q -t ecdsa -b 384 -N "" -C "$2" -f "$1/$2"
chmod 644 "$1/$2.pub"
echo "$(cd "$1" && pwd)/$2.pub"
