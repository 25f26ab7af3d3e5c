#!/usr/bin/env bash
# Trains a group of runs, one after the other, into $RUNS (default: runs), and compares them:
#
#     ./run_all.sh                the eight runs of yukunchen113/Beta-VAE, on drawn faces
#     ./run_all.sh latents6       six latents, β 0.1 to 10 on standardised pixels
#     ./run_all.sh dsprites       the score against β, and β-TCVAE, on dSprites
#
# Options go to all runs: --data img_align_celeba.zip --crop 128 for CelebA, --steps 300 for a quick
# look, --seed 1 (with another $RUNS). The same command resumes; a run that diverges stops no other.
set -u
program=$(python3 -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$0")
group=eight runs=${RUNS:-runs}
case ${1-} in eight | latents6 | dsprites) group=$1; shift ;; esac
options=("$@") folders=() failed=()

train() {           # a folder's name, its options; those given to the script come last and so win
    echo "== $1"
    python3 "${program%/*}/betavae.py" --run "$runs/$1" "${@:2}" ${options[@]+"${options[@]}"}
    case $? in
    0) folders+=("$runs/$1") ;;
    3) failed+=("$1") ;;                        # it diverged
    *) exit 1 ;;
    esac
}

case $group in
eight)
    train VAE
    for beta in 10 100 1000 10000; do train $beta-Beta-VAE --beta $beta; done
    train KLD_Anneal_40000_steps-10-Beta-VAE --beta 10 --anneal 40000
    train KLD_Decrease_40000_steps-100to1-Beta-VAE --beta-from 100 --anneal 40000
    train KLD_Decrease_100000_steps-10000to1-Beta-VAE --beta-from 10000 --anneal 100000 \
        --steps 125000 ;;
latents6)           # β × 0.0544, the faces' pixel variance: as β with squared errors divided by it
    for beta in 0.1:0.00544 1:0.0544 2:0.1088 10:0.544; do
        train 6-latents-beta-${beta%:*} --latents 6 --beta ${beta#*:} --steps 10000
    done ;;
dsprites)
    for beta in 0.25 1 4 16 64 256; do
        train dsprites-beta-$beta --data dsprites --steps 15000 --beta $beta
    done
    train dsprites-tc-6 --data dsprites --steps 15000 --tc --beta 6 ;;
esac
[ ${#folders[@]} = 0 ] || python3 "${program%/*}/betavae.py" compare "${folders[@]}" --out "$runs"
[ ${#failed[@]} = 0 ] || { echo "diverged: ${failed[*]}" >&2; exit 3; }
