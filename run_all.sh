#!/usr/bin/env bash
# Trains the runs of the README and puts them into tables and pictures:
#
#     ./run_all.sh [GROUP] [--print] [OPTION…]
#
#     eight       (default) the eight runs of yukunchen113/Beta-VAE on faces: VAE, β 10 to 10000, and
#                 three schedules
#     seeds       five of them with seeds 1 and 2, and what their claims are compared with
#     beta250     β 250, from the start and climbed to
#     latents6    six latents, β 0.1 to 10 on standardised pixels
#     dsprites    the score against β, and β-TCVAE, on dSprites, three seeds each
#     capacity    a capacity that rises to 25 nats, on dSprites
#
# Options go to every run: --steps 300 for a quick look, --data img_align_celeba.zip --crop 128 for
# CelebA. Started again, it resumes. The runs land in runs/, or where the variable RUNS says. --print
# only prints the commands, a line each, to spread them over cores or machines:
#
#     ./run_all.sh --print | OMP_NUM_THREADS=1 xargs -P 2 -L 1 env
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
runs=${RUNS:-runs}
group=eight
print=no
options=()
for word in "$@"; do
    case $word in
    --print) print=yes ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
    *) options+=("$word") ;;
    esac
done
case ${options[0]:-} in
eight | seeds | beta250 | latents6 | dsprites | capacity) group=${options[0]}; options=("${options[@]:1}") ;;
-* | '') ;;
*) echo "run_all.sh: there is no group ${options[0]} (see --help)" >&2; exit 2 ;;
esac
names=()
failed=()
child=
trap 'kill -TERM $child 2>/dev/null; wait; echo "stopped; the same command resumes" >&2; exit 130' INT TERM HUP

run() {         # in the background, so that a signal is passed on at once
    "$python" "$here/betavae.py" "$@" &
    child=$!
    wait $child
}

train() {       # a name and options; those given to the script come last and so win
    local name=$1
    shift
    set -- --run "$runs/$name" "$@" ${options[@]+"${options[@]}"}
    if [ $print = yes ]; then
        printf '%q' "$python"
        printf ' %q' "$here/betavae.py" "$@"
        echo
        return
    fi
    echo "== $name"
    run "$@"
    local code=$?
    case $code in
    0) names+=("$runs/$name") ;;
    2 | 130) exit $code ;;              # wrong options are wrong for every run
    *) failed+=("$name") ;;
    esac
}

compare() {
    if [ $print = no ] && [ ${#names[@]} -gt 0 ]; then
        run compare "${names[@]}" --out "$runs/$group" "$@" || failed+=(compare)
    fi
}

case $group in
eight)
    train VAE --beta 1
    train 10-Beta-VAE --beta 10
    train 100-Beta-VAE --beta 100
    train 1000-Beta-VAE --beta 1000
    train 10000-Beta-VAE --beta 10000
    train KLD_Anneal_40000_steps-10-Beta-VAE --beta 10 --anneal 40000
    train KLD_Decrease_40000_steps-100to1-Beta-VAE --beta-from 100 --beta 1 --anneal 40000
    train KLD_Decrease_100000_steps-10000to1-Beta-VAE --beta-from 10000 --beta 1 --anneal 100000 \
        --steps 125000
    compare
    ;;
seeds)
    for seed in 0 1 2; do
        s=; [ $seed = 0 ] || s=-seed-$seed
        train "VAE$s" --beta 1 --seed $seed
        train "10-Beta-VAE$s" --beta 10 --seed $seed
        train "100-Beta-VAE$s" --beta 100 --seed $seed
        train "KLD_Anneal_40000_steps-10-Beta-VAE$s" --beta 10 --anneal 40000 --seed $seed
        train "KLD_Decrease_40000_steps-100to1-Beta-VAE$s" --beta-from 100 --beta 1 --anneal 40000 \
            --seed $seed
        train "VAE-25000-steps$s" --beta 1 --steps 25000 --seed $seed
        train "VAE-25000-steps-leak-0$s" --beta 1 --steps 25000 --leak 0 --seed $seed
    done
    compare
    ;;
beta250)
    train 250-Beta-VAE --beta 250 --steps 30000
    train KLD_Anneal_20000_steps-250-Beta-VAE --beta 250 --anneal 20000 --steps 30000
    compare
    ;;
latents6)       # β times 0.0544, the faces' pixel variance: squared errors divided by it have β
    train 6-latents-beta-0.1 --latents 6 --beta 0.00544 --steps 10000
    train 6-latents-beta-1 --latents 6 --beta 0.0544 --steps 10000
    train 6-latents-beta-2 --latents 6 --beta 0.1088 --steps 10000
    train 6-latents-beta-10 --latents 6 --beta 0.544 --steps 10000
    compare --chart beta:reconstruction --chart beta:kl
    ;;
dsprites)
    for seed in 0 1 2; do
        for beta in 0.25 1 4 16 64 256; do
            train "dsprites-beta-$beta-seed-$seed" --data dsprites --steps 15000 --beta $beta --seed $seed
        done
        train "dsprites-tc-6-seed-$seed" --data dsprites --steps 15000 --tc --beta 6 --seed $seed
    done
    compare --baselines 3 --pairs 1,20,64 --factors 4,5 --chart beta:accuracy_K4_L20 \
        --chart mig:reconstruction
    ;;
capacity)
    train dsprites-capacity --data dsprites --capacity 25 --gamma 1000 --anneal 100000 --steps 100000
    compare
    ;;
esac
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}. Each one's message is above." >&2
    exit 1
fi
