#!/usr/bin/env bash
# A TPU slice of several hosts, one process a host. From a machine with gcloud:
#   TPU=my-slice ZONE=us-east5-a DATA=/mnt/data OUTPUT=/mnt/runs \
#     scripts/launch/tpu_pod.sh --preset track3 --optimizer shampoo
# A row of the medium track, on 8 chips of a v5p: the same with --preset medium.
# Every host needs a clone in ~/shampoo-jax (REPOSITORY is cloned where there is none) and sees the
# same DATA (shards made before) and OUTPUT, in a mounted bucket say: all hosts write checkpoints into
# one folder. Ctrl-C does not reach the hosts. A signal to one of them stops all, with a checkpoint:
#   gcloud compute tpus tpu-vm ssh $TPU --zone $ZONE --command "pkill -INT -f 'nanogpt[ ]train'"
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${DATA:?folder of shards that all hosts share}"
: "${OUTPUT:?folder of runs that all hosts share}" "${1:?settings of the run, --optimizer at least}"
if [ -n "${REPOSITORY:-}" ]; then
  clone="git clone $(printf '%q' "$REPOSITORY") shampoo-jax"
else
  clone="{ echo 'no clone in ~/shampoo-jax: set REPOSITORY' >&2; exit 1; }"
fi
arguments="$(printf '%q ' --mesh "${MESH:-data=-1}" --data.directory "$DATA" \
  --output.directory "$OUTPUT" "$@")"
command="set -e
[ -d shampoo-jax ] || $clone
cd shampoo-jax
[ -d .venv ] || make venv EXTRAS=tpu
exec .venv/bin/python -m nanogpt train --distributed $arguments"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$command"
