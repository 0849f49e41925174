#!/usr/bin/env bash
# One Ray node of deploy/slurm/train.sh, for as long as its step runs. A worker that dies joins the cluster anew.
# Arguments: those of `ray start`, `--head` first if it is the head.
set -euo pipefail

ulimit -n "$(ulimit -Hn)"
command=(ray start "$@" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --dashboard-agent-listen-port=0 --disable-usage-stats --block)
[[ $1 != --head ]] || exec "${command[@]}"

trap 'trap "" TERM; kill -TERM $(jobs -p) 2>/dev/null; wait; exit 0' TERM
while :; do
    "${command[@]}" &
    wait "$!" || true
    printf '%(%F %T)T the Ray worker on %s ended; it starts again\n' -1 "$HOSTNAME"
    sleep 5 &
    wait "$!"
done
