#!/usr/bin/env bash
# One node, all of its GPUs, one process: scripts/launch/gpu_node.sh --preset track3 --optimizer shampoo
# Rows in one pass are over all devices: on 8 GPUs give --data.microbatch-rows 128 for 16 on each.
# A row of the medium track: scripts/launch/gpu_node.sh --preset medium --optimizer muon_mlp_decay
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -d .venv ] || make venv EXTRAS="${EXTRAS:-cuda12}"
exec .venv/bin/python -m nanogpt train --mesh data=-1 "$@"
