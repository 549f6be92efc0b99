#!/bin/bash
# Trains on the hosts of a file, started by Open MPI 4 or 5:
#     experiments/launch/open_mpi.sh HOSTFILE PER_HOST PHOTOS --net D --scale 256 512 --dtype bfloat16
# HOSTFILE has a line "name slots=PER_HOST" for each host. This host's line comes first.
set -euo pipefail
hosts=$1 per_host=$2
shift 2
count=$(($(awk '!/^#/ && NF' "$hosts" | wc -l) * per_host))

JAX_COORDINATOR_ADDRESS=$(awk '!/^#/ && NF {print $1; exit}' "$hosts"):${PORT:-8476}
JAX_NUM_PROCESSES=$count
export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES

# Each process gets one GPU; hosts without GPUs ignore the variable. --bind-to none lets a process's input threads use all cores.
# shellcheck disable=SC2016 # the shell of each process reads the variables
exec mpirun --hostfile "$hosts" -np "$count" --map-by "ppr:$per_host:node" --bind-to none \
    -x JAX_COORDINATOR_ADDRESS -x JAX_NUM_PROCESSES -x PATH \
    bash -c 'export JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK; exec vgg-jax train "$@"' train "$@"
