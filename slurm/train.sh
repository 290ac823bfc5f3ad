# What every job in this folder does. A job file sets RECIPE and sources this one.
#
#   sbatch [Slurm's options] slurm/dcgan.sh [overrides of the recipe]
#
# One process for each GPU of the allocation; without GPUs, one for each task of a node
# (--ntasks-per-node). Each element of a job array is a run of its own, its number the seed.
# From the environment: RECIPE another recipe, RUNS the folder of all runs, RUN_NAME to go on with
# the run of a job that ended, SADDLE_DATA and SADDLE_CACHE as everywhere.
set -u
cd "$SLURM_SUBMIT_DIR" || exit
[ -x .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
case " $* " in *" --run"*)
  echo "error: set RUNS and RUN_NAME in the environment, in place of --runs and --run-name" >&2
  exit 2
  ;;
esac

# The same name after a requeue, another for each job and each element of an array.
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  name=${RUN_NAME:-job$SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  set -- --seed "$SLURM_ARRAY_TASK_ID" "$@"
else
  name=${RUN_NAME:-job$SLURM_JOB_ID}
fi
runs=${RUNS:-runs}
mkdir -p "$runs/$RECIPE/$name" || exit
folder=$(cd "$runs/$RECIPE/$name" && pwd)
echo "job $SLURM_JOB_ID writes to $folder/slurm.log"
exec >>"$folder/slurm.log" 2>&1
echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NODELIST"

# One task on each node. USR1 is ignored until a program listens to it: it would kill the program.
# That a node is done first is normal after a signal; one that then still hangs is not waited for.
on_each_node=(srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1
  --cpu-bind=quiet,none --kill-on-bad-exit=0 --wait=300 bash -c 'trap "" USR1; exec "$@"' bash)

# Data goes to the nodes' own disks, where there are some.
shared=${SADDLE_CACHE:-$HOME/.cache/saddle}
disk=${SLURM_TMPDIR:-${TMPDIR:-}}
staged=
if [ -n "$disk" ]; then
  staged=$disk/saddle-$SLURM_JOB_ID
  if "${on_each_node[@]}" python -m launch.stage "$staged" "$RECIPE" "$@"; then
    export SADDLE_CACHE=$staged
  else
    echo "data stays in $shared"
  fi
fi

# Node names need not be host names; torchrun's store is on the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
ranks=${SLURM_GPUS_ON_NODE:-0}
[ "$ranks" -gt 0 ] || ranks=${SLURM_NTASKS_PER_NODE:-1}
threads=$((SLURM_CPUS_ON_NODE / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else half of torchrun's restarts fail
export SADDLE_STOPPED=$folder/.stopped      # left by a run that USR1 has stopped
rm -f "$SADDLE_STOPPED"

# Another id at each start: a requeued job must not meet what is left of the one before. Workers have
# 100 of the 120 s between signal and end to write their checkpoint.
"${on_each_node[@]}" torchrun "--nnodes=$SLURM_JOB_NUM_NODES" "--nproc-per-node=$ranks" \
  "--rdzv-id=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d \
  "--rdzv-endpoint=$address:$((20000 + SLURM_JOB_ID % 10000))" --max-restarts=2 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=100 \
  -m engine.train "$RECIPE" "$@" --runs "$runs" --run-name "$name"
code=$?
echo "$(date '+%F %T') torchrun ended with $code"

if [ -n "$staged" ]; then
  # what metrics made here is kept for the next job; renamed, so that none reads half a file
  for made in "$staged"/*.safetensors; do
    [ -e "$made" ] && [ ! -e "$shared/${made##*/}" ] &&
      cp "$made" "$shared/.$SLURM_JOB_ID" && mv "$shared/.$SLURM_JOB_ID" "$shared/${made##*/}"
  done
  "${on_each_node[@]}" rm -rf "$staged"
fi
if [ -e "$SADDLE_STOPPED" ]; then
  echo "$(date '+%F %T') requeue"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
