"""Stand-ins for Slurm's commands that run everything on this machine, and the variables of an allocation."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "deploy" / "slurm" / "train.sh"

SRUN = """\
#!/usr/bin/env bash
# Runs the command once for each task; ends with them, or ends them when it is told to.
printf '%s\\n' "$*" >>"$FAKE/srun.log"
tasks=1
while [[ $1 == --* ]]; do
    case $1 in
        --ntasks=*) tasks=${1#*=} ;;
    esac
    shift
done
ended='' pids=()
trap 'ended=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM
for ((task = 0; task < tasks; task++)); do
    [[ -z $ended ]] || break
    SLURM_PROCID=$task "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
done
"""

SCONTROL = """\
#!/usr/bin/env bash
case $1 in
    show) for ((node = 1; node <= SLURM_NNODES; node++)); do echo "node$node"; done ;;
    requeue) echo "$2" >>"$FAKE/requeued" ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def allocation(place: Path, nodes: int, job: int) -> dict[str, str]:
    """Put the stand-ins into `place`, a directory to submit from; the environment that sbatch gives its script there.

    What the stand-ins are asked for is in `place`: `srun.log`, `requeued`.
    """
    executable(place / "bin" / "srun", SRUN)
    executable(place / "bin" / "scontrol", SCONTROL)
    (place / "deploy").symlink_to(ROOT / "deploy")
    return os.environ | {
        "FAKE": str(place),
        "HOME": str(place),
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_NNODES": str(nodes),
        "SLURM_SUBMIT_DIR": str(place),
    }
