#!/usr/bin/env bash
# The dependencies in setup.cfg without torch, one a line: the image's own torch must stay.
set -euo pipefail
sed -n '/^install_requires/,/^$/p' "$(dirname "${BASH_SOURCE[0]}")/../setup.cfg" |
    sed -n 's/^ \{4\}//p' | grep -v '^torch\b'
