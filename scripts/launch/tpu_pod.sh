#!/usr/bin/env bash
# A TPU pod slice, one process a host. From a machine with gcloud:
#   TPU=my-slice ZONE=us-east5-a scripts/launch/tpu_pod.sh --preset track3 --optimizer shampoo
# Every host needs a clone in ~/shampoo-jax (REPOSITORY is cloned where there is none) and sees the
# same OUTPUT, a mounted bucket say: checkpoints are written by all hosts into one folder.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${OUTPUT:?folder that all hosts share}"
arguments="$(printf '%q ' "$@")"
command="set -e
[ -d shampoo-jax ] || git clone '${REPOSITORY:-}' shampoo-jax
cd shampoo-jax
[ -d .venv ] || make venv EXTRAS=tpu
.venv/bin/python -m scripts.speedrun --mesh '${MESH:-data=-1}' --output.directory '$OUTPUT' $arguments"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$command"
