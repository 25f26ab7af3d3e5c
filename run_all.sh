#!/usr/bin/env bash
# Trains the runs of the README and puts them into tables and pictures:
#
#     ./run_all.sh [GROUP] [--print] [OPTION…]
#
#     eight       (default) the eight runs of yukunchen113/Beta-VAE, on faces
#     short       a tenth of their length with three seeds, and what else their claims need
#     latents6    six latents, β 0.1 to 10 on standardised pixels
#     dsprites    the score against β, and β-TCVAE, on dSprites, three seeds each
#     capacity    a capacity that rises to 25 nats, on dSprites
#
# Options go to every run: --steps 300 for a quick look, --data img_align_celeba.zip --crop 128 for
# CelebA. Started again, it resumes. The runs land in runs/, or where the variable RUNS says.
# --print only prints the commands, a line each, to spread them over cores or machines:
#
#     ./run_all.sh --print | OMP_NUM_THREADS=1 xargs -P 2 -L 1 env
#
# Then the same command without --print makes the tables.
set -u
program=$(cd "$(dirname "$0")" && pwd)/betavae.py
python=${PYTHON:-$(command -v python || command -v python3)}
runs=${RUNS:-runs} group=eight print='' child='' names=() failed=() options=() views=()
trap 'kill -TERM $child 2>/dev/null; wait; echo stopped >&2; exit 130' INT TERM HUP
for word in "$@"; do
    case $word in
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    --print) print=yes ;;
    *) options+=("$word") ;;
    esac
done
case ${options[0]:--} in
-*) ;;
eight | short | latents6 | dsprites | capacity)
    group=${options[0]}
    options=("${options[@]:1}") ;;
*) echo "run_all.sh: there is no group ${options[0]} (see --help)" >&2; exit 2 ;;
esac

run() {         # in the background, so that a signal is passed on at once
    "$python" "$program" "$@" & child=$!
    wait $child
}

train() {       # a name and options; those given to the script come last and so win
    set -- --run "$runs/$1" "${@:2}" ${options[@]+"${options[@]}"}
    [ $print ] && { printf '%q' "$python"; printf ' %q' "$program" "$@"; echo; return; }
    echo "== $2"
    run "$@"; local code=$?
    case $code in
    0) names+=("$2") ;;
    3) failed+=("$2") ;;                # it diverged; what else went wrong is wrong for every run
    *) exit $code ;;
    esac
}

case $group in
eight)
    train VAE
    for beta in 10 100 1000 10000; do
        train $beta-Beta-VAE --beta $beta
    done
    train KLD_Anneal_40000_steps-10-Beta-VAE --beta 10 --anneal 40000
    train KLD_Decrease_40000_steps-100to1-Beta-VAE --beta-from 100 --anneal 40000
    train KLD_Decrease_100000_steps-10000to1-Beta-VAE --beta-from 10000 --anneal 100000 \
        --steps 125000 ;;
short)
    for seed in 0 1 2; do
        tenth() { train "short-$1-seed-$seed" --seed $seed --steps "${@:2}"; }
        tenth VAE 5000
        for beta in 10 100 250 1000; do tenth $beta-Beta-VAE 5000 --beta $beta; done
        tenth KLD_Anneal_4000_steps-10-Beta-VAE 5000 --beta 10 --anneal 4000
        tenth KLD_Decrease_4000_steps-100to1-Beta-VAE 5000 --beta-from 100 --anneal 4000
        tenth VAE-leak-0 5000 --leak 0
        tenth KLD_Anneal_4000_steps-250-Beta-VAE 5000 --beta 250 --anneal 4000
        tenth VAE-2500-steps 2500
        tenth KLD_Decrease_10000_steps-10000to1-Beta-VAE 12500 --beta-from 10000 --anneal 10000
    done ;;
latents6)       # β × 0.0544, the faces' pixel variance: as β with squared errors divided by it
    for beta in 0.1:0.00544 1:0.0544 2:0.1088 10:0.544; do
        train 6-latents-beta-${beta%:*} --latents 6 --beta ${beta#*:} --steps 10000
    done
    views=(--chart beta:reconstruction --chart beta:kl) ;;
dsprites)
    for seed in 0 1 2; do
        sprites() { train dsprites-$1-seed-$seed --data dsprites --steps 15000 "${@:2}"; }
        for beta in 0.25 1 4 16 64 256; do
            sprites beta-$beta --seed $seed --beta $beta
        done
        sprites tc-6 --seed $seed --tc --beta 6
    done
    views=(--pairs 1,5,20,64,200 --factors 4,5 --chart beta:accuracy_K4_L1,accuracy_K4_L1_samples
        --chart beta:accuracy_K4_L20,accuracy_K4_L20_samples --chart mig:reconstruction
        --chart reconstruction:accuracy_K4_L20_samples) ;;
capacity)
    train dsprites-capacity --data dsprites --capacity 25 --anneal 100000 --steps 100000 ;;
esac
[ $print ] || [ ${#names[@]} = 0 ] ||
    run compare "${names[@]}" --out "$runs/$group" ${views[@]+"${views[@]}"} || failed+=(compare)
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}. Each one's message is above." >&2; exit 1; }
