#!/bin/bash
# CycleGAN on horse2zebra, from Saddle's folder: sbatch slurm/cyclegan.sh [overrides of the recipe]
# Slurm's options before the file's name take the place of these; train.sh says the rest.
#SBATCH --job-name=cyclegan
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@120 --requeue --open-mode=append
RECIPE=${RECIPE:-cyclegan_horse2zebra}
: "${SLURM_SUBMIT_DIR:?start this file by sbatch}"
source "$SLURM_SUBMIT_DIR/slurm/train.sh" # Slurm runs a copy of this file in a folder of its own
