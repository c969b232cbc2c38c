#!/usr/bin/env bash
# Installs the emulator of Google Cloud Storage that the tests prefer: fake-gcs-server, which knows
# preconditions and generations. Needs Go 1.25 or later and its module proxy; from an empty cache it
# takes two minutes of computing and 50 MB of disk for the program. Tests look for it on PATH and in
# $(go env GOPATH)/bin. Without it they use gcp-storage-emulator, from the extra [dev], and skip what
# that cannot do; moto's server, for S3, comes from the same extra.
set -euo pipefail

version=v1.56.1

if ! command -v go >/dev/null; then
  echo "provision_stores: go is not on PATH; install Go from https://go.dev/dl/" >&2
  exit 2
fi
go install "github.com/fsouza/fake-gcs-server@$version"
echo "installed $(go env GOPATH)/bin/fake-gcs-server $version"
