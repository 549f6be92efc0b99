#!/bin/bash
# Trains on all hosts of a Cloud TPU slice:
#     NAME=vgg ZONE=us-central2-b experiments/launch/cloud_tpu.sh gs://BUCKET/photos --net D --dtype bfloat16
# Install once on all hosts before:
#     gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "pip install 'vgg-jax[train]' 'jax[tpu]'"
set -euo pipefail
: "${NAME:?expected the name of the TPU}" "${ZONE:?expected its zone}"
: "${1:?expected DATA and the flags of vgg-jax train}"
quoted=$(printf '%q ' "$@")
# Pass "on", because the environment of a host does not show that it belongs to a slice; jax asks the machine.
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "vgg-jax train ${quoted}--distributed on"
