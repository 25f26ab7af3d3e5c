#!/usr/bin/env bash
# The eight runs of the documents, and their comparison:
#
#     ./run_all.sh [--print] [OPTION…]        options go to every run: ./run_all.sh --steps 300 for a quick look,
#                                             ./run_all.sh --data img_align_celeba.zip --crop 128 for CelebA
#
# Started again it goes on where it was. --print prints the eight commands, a line each, to spread over machines:
#     ./run_all.sh --print | xargs -P 4 -I {} bash -c "{}"       (or GNU parallel, or a line for each job of an array)
# The runs land in runs/, or in the folder that the variable RUNS names.
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
runs=${RUNS:-runs}
print=no
if [ "${1:-}" = --print ]; then print=yes; shift; fi

names=()
failed=()
trap 'echo; echo "stopped; start again to go on"; exit 130' INT TERM

train() {       # name, options …; the options given to the script come last and so win
    local name=$1; shift
    if [ $print = yes ]; then
        printf '%q' "$python"
        printf ' %q' "$here/betavae.py" --run "$runs/$name" "$@"
        echo
        return
    fi
    echo "== $name"
    "$python" "$here/betavae.py" --run "$runs/$name" "$@"
    local code=$?
    if [ $code -eq 130 ]; then kill -INT $$; exit 130; fi
    if [ $code -eq 0 ]; then names+=("$runs/$name"); else failed+=("$name"); fi
}

train VAE --beta 1 "$@"
train 10-Beta-VAE --beta 10 "$@"
train 100-Beta-VAE --beta 100 "$@"
train 1000-Beta-VAE --beta 1000 "$@"
train 10000-Beta-VAE --beta 10000 "$@"
train KLD_Anneal_40000_steps-10-Beta-VAE --beta 10 --anneal 40000 "$@"
train KLD_Decrease_40000_steps-100to1-Beta-VAE --beta-from 100 --beta 1 --anneal 40000 "$@"
train KLD_Decrease_100000_steps-10000to1-Beta-VAE --beta-from 10000 --beta 1 --anneal 100000 --steps 125000 "$@"
if [ $print = yes ]; then exit 0; fi

if [ ${#names[@]} -gt 0 ]; then
    "$python" "$here/betavae.py" compare "${names[@]}" || failed+=(comparison)
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}. Its own message is above; the others are whole." >&2
    exit 1
fi
