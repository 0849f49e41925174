#!/usr/bin/env bash
# Trains on a Slurm allocation: a Ray head on the first node, a Ray worker on each of the others, then the driver.
# From the project's directory, which all nodes share with its .venv, as with runs/:
#
#   sbatch --nodes=4 deploy/slurm/train.sh --config deploy/configs/qwen3_8b_deepmath_4_nodes.yaml
#
# Its arguments are those of learner.train. A job that begins again continues its run (`--resume auto`).
#   900 s before the time limit   the run stops with a checkpoint, and the job is queued again
#   preempted, a node fails       Slurm queues it again
#   a part of the run fails       the driver starts again at once, at most E3RL_RESTARTS times
#   the Ray cluster is lost       the job is queued again, at most E3RL_REQUEUES times in all
#   scancel --signal=TERM --batch JOB     the run stops with a checkpoint, and the job ends
#
# Checked by shellcheck. Its logic is tested with stand-ins for srun and scontrol that start real Ray nodes on one machine.
# Never run under Slurm: expect to adjust the lines below to your cluster (partition, account, names of the GPUs).
#SBATCH --job-name=e3rl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
: "${SLURM_JOB_ID:?}" "${SLURM_NNODES:?}" "${SLURM_JOB_NODELIST:?}"
: "${SLURM_CPUS_PER_TASK:?give --cpus-per-task, the CPUs of a node}"
restarts=${E3RL_RESTARTS:-3}
requeues=${E3RL_REQUEUES:-10}
start_seconds=${E3RL_START_SECONDS:-600} # what the Ray nodes have to start in
stop_seconds=${E3RL_STOP_SECONDS:-840}   # what the driver has to stop in; less than the 900 above

export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
say() { printf '%(%F %T)T slurm job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"; }

# Jobs on one node do not meet: each has ports of its own, below those that the system hands out, above Ray's workers'.
offset=$((SLURM_JOB_ID % 4000))
gcs_port=$((20000 + offset)) client_port=$((24000 + offset)) dashboard_port=$((28000 + offset))
export RAY_TEMPORARY=/tmp/ray-$SLURM_JOB_ID # short: sockets lie below it
export RAY_AUTH_MODE=token
if [[ -z ${RAY_AUTH_TOKEN:-} ]]; then
    RAY_AUTH_TOKEN=$(umask 077 && ray get-auth-token --generate) # that of ~/.ray/auth_token
    export RAY_AUTH_TOKEN
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]:?no host in $SLURM_JOB_NODELIST} # where this script runs, too
head_ip=${E3RL_HEAD_IP:-$(python -c 'import ray; print(ray.util.get_node_ip_address())')}
export RAY_ADDRESS=$head_ip:$gcs_port

step=(srun --overlap --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=none --kill-on-bad-exit=0)

steps=() driver='' wanted='' kill_at=0 # wanted: what a signal asked for, "stop" or "requeue"
# shellcheck disable=SC2329 # called by traps
ask() {
    wanted=$1
    kill_at=$((SECONDS + stop_seconds))
    say "asked to $1; the run stops with a checkpoint"
    [[ -z $driver ]] || kill -TERM "$driver" 2>/dev/null || true
}
trap 'ask requeue' USR1
trap 'ask stop' TERM INT

lives() { kill -0 "$1" 2>/dev/null; }

# shellcheck disable=SC2329 # called by `end`
end_steps() {
    local pid left
    for pid in "${steps[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "${steps[@]}"; do
        for ((left = 225; left > 0; left--)); do # Ray itself takes up to 30 s
            lives "$pid" || break
            sleep 0.2
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

# shellcheck disable=SC2329 # called by a trap
end() {
    local status=$?
    trap '' USR1 TERM INT
    end_steps
    # Ray's logs of a job that failed stay where they are.
    ((status)) || "${step[@]}" --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" rm -rf "$RAY_TEMPORARY"
}
trap end EXIT

queue_again() {
    if [[ $1 != limit ]] && ((${SLURM_RESTART_COUNT:-0} >= requeues)); then
        say "$1, and the job was queued again $requeues times"
        exit 1
    fi
    say "queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 1 # Slurm has ended the job by now
}

say "Ray head at $RAY_ADDRESS on $head, $SLURM_NNODES node(s); dashboard: http://$head_ip:$dashboard_port"
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" bash deploy/slurm/node.sh --head --node-ip-address="$head_ip" \
    --port="$gcs_port" --ray-client-server-port="$client_port" --temp-dir="$RAY_TEMPORARY" \
    --dashboard-host="$head_ip" --dashboard-port="$dashboard_port" &
steps+=($!)
python deploy/await_nodes.py --nodes 1 --seconds "$start_seconds" --while-pid "$!" || queue_again "the Ray head did not start"
if ((SLURM_NNODES > 1)); then
    "${step[@]}" --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
        bash deploy/slurm/node.sh --address="$RAY_ADDRESS" &
    steps+=($!)
    python deploy/await_nodes.py --nodes "$SLURM_NNODES" --seconds "$start_seconds" --while-pid "$!" \
        || queue_again "the Ray workers did not start"
fi

for ((attempt = 0; ; attempt++)); do
    [[ -z $wanted ]] || break
    python -m learner.train "$@" --resume auto &
    driver=$!
    while lives "$driver"; do
        sleep 0.2
        [[ -z $wanted ]] || ((SECONDS < kill_at)) || kill -KILL "$driver" 2>/dev/null || true
    done
    status=0
    wait "$driver" || status=$?
    driver=''
    ((status)) || exit 0
    [[ -z $wanted ]] || break
    ((status != 2)) || { say "the configuration or the input is wrong; not started again"; exit 2; }
    lives "${steps[0]}" || queue_again "the Ray cluster was lost"
    if ((attempt >= restarts)); then
        say "the run failed with status $status, $((attempt + 1)) times"
        exit "$status"
    fi
    say "the run failed with status $status; starting it again"
done
[[ $wanted != requeue ]] || queue_again limit
exit 130
