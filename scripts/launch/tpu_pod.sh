#!/usr/bin/env bash
# A TPU pod slice, one process a host. From a machine with gcloud:
#   TPU=my-slice ZONE=us-east5-a scripts/launch/tpu_pod.sh --preset track3 --optimizer shampoo
# Every host needs a clone in ~/shampoo-jax (REPOSITORY is cloned where there is none) and sees the
# same DATA (shards made before) and OUTPUT, in a mounted bucket say: all hosts write checkpoints into
# one folder.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${DATA:?folder of shards that all hosts share}"
: "${OUTPUT:?folder of runs that all hosts share}"
arguments="$(printf '%q ' "$@")"
command="set -e
[ -d shampoo-jax ] || git clone '${REPOSITORY:-set REPOSITORY}' shampoo-jax
cd shampoo-jax
[ -d .venv ] || make venv EXTRAS=tpu
.venv/bin/python -m scripts.speedrun --distributed --mesh '${MESH:-data=-1}' --data.directory '$DATA' \
  --output.directory '$OUTPUT' $arguments"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$command"
