#!/usr/bin/env bash
# Make a certificate authority, and with it a certificate for the SuperLink.
#   deploy/certificates.sh DIR HOST [HOST ...]
# HOST: every name or address by which SuperNodes and operators reach the SuperLink. The
# SuperLink's own processes reach it as 127.0.0.1, which is added, and so is localhost.
# DIR gets ca.crt (for everybody), server.pem and server.key (for the SuperLink), and
# ca.key, which belongs on a machine without network. An authority that is there already
# is used again, so that a new certificate needs no new ca.crt at the nodes.
set -euo pipefail
umask 077
[ $# -ge 2 ] || { echo "usage: $0 DIR HOST [HOST ...]" >&2; exit 2; }
command -v openssl >/dev/null || { echo "error: openssl is missing; install it" >&2; exit 2; }
DIR=$1; shift
DAYS=${DAYS:-365}
mkdir -p "$DIR"

names=""
for host in "$@" localhost 127.0.0.1; do
  if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then kind=IP; else kind=DNS; fi
  [[ ",$names," == *",$kind:$host,"* ]] || names="$names${names:+,}$kind:$host"
done

if [ -f "$DIR/ca.crt" ] && [ ! -f "$DIR/ca.key" ]; then
  echo "error: $DIR has ca.crt but not the ca.key that signs; put it back for this" >&2
  exit 2
fi
log=$(mktemp); trap 'rm -f "$log"' EXIT
# Say what openssl said, but only if it failed.
quietly() { "$@" 2>"$log" || { cat "$log" >&2; exit 2; }; }
if [ ! -f "$DIR/ca.key" ]; then
  quietly openssl req -x509 -newkey rsa:3072 -nodes -sha256 -days 3650 -subj "/CN=fedpft-ca" \
    -addext "basicConstraints=critical,CA:TRUE" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout "$DIR/ca.key" -out "$DIR/ca.crt"
fi
draft=$(mktemp -d "$DIR/.draft.XXXXXX")
trap 'rm -rf "$draft" "$log"' EXIT
quietly openssl req -newkey rsa:3072 -nodes -sha256 -subj "/CN=superlink" \
  -keyout "$draft/server.key" -out "$draft/server.csr"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > "$draft/ext"
quietly openssl x509 -req -sha256 -days "$DAYS" -in "$draft/server.csr" -CA "$DIR/ca.crt" \
  -CAkey "$DIR/ca.key" -CAcreateserial -extfile "$draft/ext" -out "$draft/server.pem"
mv "$draft/server.key" "$draft/server.pem" "$DIR/"
chmod 644 "$DIR/ca.crt" "$DIR/server.pem"
until=$(openssl x509 -noout -enddate -in "$DIR/server.pem")
echo "$(cd "$DIR" && pwd)/server.pem: $names, until ${until#*=}"
