#!/usr/bin/env bash
# The runs of the documents, and what is made of them:
#
#     ./run_all.sh [--print] [GROUP] [OPTION…]
#
#     eight       (default) VAE, β 10 to 10000 and three schedules on faces, one sheet and one table of them
#     beta250     β 250, at once and climbed to, beside the VAE of `eight`: the active latents (five at most), from five codes
#     latents6    six latents, β 0.1 to 10 on standardised pixels (of faces: with other data their variance is another)
#     dsprites    VAE, β 4 and β-TCVAE, three seeds each, and the paper's table
#     sweep       the metric against β for three numbers of latents, on dsprites
#     publish     copies the pictures and numbers of all that is in runs/, made small, into results/
#
# Options go to every run: ./run_all.sh --steps 300 for a quick look, --data img_align_celeba.zip --crop 128 for CelebA.
# Started again it goes on where it was. --print prints the commands, a line each, to spread over cores or machines:
#     ./run_all.sh --print | OMP_NUM_THREADS=1 xargs -P 4 -L 1 env         then ./run_all.sh for the comparison
# The runs land in runs/, or in the folder that the variable RUNS names.
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
runs=${RUNS:-runs}
print=no
if [ "${1:-}" = --print ]; then print=yes; shift; fi
group=eight
case ${1:-} in eight | beta250 | latents6 | dsprites | sweep | publish) group=$1; shift ;; esac

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

after() {       # a command of betavae.py over all runs that are whole
    if [ $print = yes ] || [ ${#names[@]} -eq 0 ]; then return; fi
    "$python" "$here/betavae.py" "$1" "${names[@]}" "${@:2}" || failed+=("$1")
}

picture() {     # a picture of the folders in `names`, by the Python on standard input
    if [ $print = yes ] || [ ${#names[@]} -eq 0 ]; then return; fi
    PYTHONPATH=$here "$python" - "${names[@]}" || failed+=(picture)
}

case $group in
eight)
    train VAE --beta 1 "$@"
    train 10-Beta-VAE --beta 10 "$@"
    train 100-Beta-VAE --beta 100 "$@"
    train 1000-Beta-VAE --beta 1000 "$@"
    train 10000-Beta-VAE --beta 10000 "$@"
    train KLD_Anneal_40000_steps-10-Beta-VAE --beta 10 --anneal 40000 "$@"
    train KLD_Decrease_40000_steps-100to1-Beta-VAE --beta-from 100 --beta 1 --anneal 40000 "$@"
    train KLD_Decrease_100000_steps-10000to1-Beta-VAE --beta-from 10000 --beta 1 --anneal 100000 --steps 125000 "$@"
    after compare
    ;;
beta250)
    train VAE --beta 1 "$@"
    train 250-Beta-VAE --beta 250 --steps 30000 "$@"
    train KLD_Anneal_20000_steps-250-Beta-VAE --beta 250 --anneal 20000 --steps 30000 "$@"
    picture << 'EOF'
import json, sys, torch, betavae, data
from pathlib import Path
for run in map(Path, sys.argv[1:]):
    s, model = json.loads((run / 'summary.json').read_text()), betavae.load(run)
    d = data.load(*(json.loads((run / 'settings.json').read_text())[k] for k in ('data', 'crop')))
    mu = betavae.codes_of(model, torch.from_numpy(d.images(d.held_out(5))), 'fp32')[0]                      # (5, J)
    rows = sorted(range(len(mu[0])), key=lambda j: -s['kl_per_latent'][j])[:max(1, min(5, s['active_latents']))]
    z = torch.stack([betavae.traverse(z, rows, torch.linspace(-3, 3, 8)) for z in mu], 1)                   # (rows, 5, 8, J)
    labels = [f"{s['latent_names'][j]}, {s['kl_per_latent'][j]:.2f} nats" if n == 0 else '' for j in rows for n in range(5)]
    betavae.save_picture(run / 'five_codes.png', betavae.sheet(
        betavae.means_of(model, z).flatten(0, 1), labels, f"{run.name}, {s['steps']:,} steps: its top latents "
        f"(active: {s['active_latents']}), each from -3 to 3 and from five codes", scale=1))
EOF
    ;;
latents6)       # 0.0544 is the variance of the faces' pixels: with squared errors divided by it, β is β · 0.0544 of ours
    train 6-latents-beta-0.1 --latents 6 --beta 0.00544 --steps 10000 "$@"
    train 6-latents-beta-1 --latents 6 --beta 0.0544 --steps 10000 "$@"
    train 6-latents-beta-2 --latents 6 --beta 0.1088 --steps 10000 "$@"
    train 6-latents-beta-10 --latents 6 --beta 0.544 --steps 10000 "$@"
    picture << 'EOF'
import json, sys, betavae
from pathlib import Path
runs = [Path(run) for run in sys.argv[1:]]
s = [json.loads((run / 'summary.json').read_text()) for run in runs]
beta = [r['beta'] / 0.0544 for r in s]
data = json.loads((runs[0] / 'settings.json').read_text())['data']
what = f"6 latents, {Path(data).stem}, {s[0]['steps']:,} steps"
betavae.save_picture(runs[0].parent / '6-latents.png', betavae.chart([
    dict(title=title, x=f'beta on standardised pixels; {what}', log_x=True, series={'': (beta, [r[term] for r in s])})
    for term, title in (('reconstruction', 'squared error, summed over pixels'), ('kl', 'KL, nats per image'))]))
EOF
    ;;
dsprites)
    for seed in 0 1 2; do
        for objective in "VAE --beta 1" "4-Beta-VAE --beta 4" "6-Beta-TCVAE --beta 6 --tc"; do
            read -r name options <<< "$objective"
            # shellcheck disable=SC2086
            train "dsprites-$name-seed-$seed" --data dsprites --steps 20000 $options --seed $seed "$@"
        done
    done
    after score --baselines 3 --pairs 1,5,20,64,200 --factors 4,5 --out "$runs"
    ;;
sweep)
    for latents in 5 10 20; do
        for beta in 0.2 1 4 16 64; do
            train "sweep-$latents-latents-beta-$beta" --data dsprites --latents $latents --beta $beta --steps 5000 "$@"
        done
    done
    after score --pairs 20 --factors 4 --out "$runs/sweep"
    picture << 'EOF'
import json, sys, betavae
from pathlib import Path
steps = json.loads(Path(sys.argv[1], 'summary.json').read_text())['steps']
panels = [dict(title=title, x=f'beta · latents / pixels; {steps:,} steps, one seed', log_x=True, series={})
          for title in ('accuracy in %, K = 4, L = 20', 'mutual information gap, in %')]
for run in sys.argv[1:]:
    s = json.loads(Path(run, 'summary.json').read_text())
    J = len(s['kl_per_latent'])
    for panel, cell in zip(panels, ('K = 4, L = 20, 10000 points', 'MIG')):
        xs, ys = panel['series'].setdefault(f'{J} latents', ([], []))
        xs.append(s['beta'] * J / 4096)
        ys.append(100 * s['scores'][cell])
betavae.save_picture(Path(sys.argv[1]).parent / 'sweep.png', betavae.chart(panels))
EOF
    ;;
publish)
    names=("$runs" "$here/results")
    picture << 'EOF'
import shutil, sys
from pathlib import Path
from PIL import Image
runs, results = map(Path, sys.argv[1:])
for path in sorted(runs.rglob('*')):
    name, run = path.name, path.parent.name
    pictures = ('traversal.png',) if run.startswith('6-latents') else () if run.startswith('sweep') else (
        'top_latent.png', 'traversal.png', 'reconstructions.png', 'curves.png', 'five_codes.png')
    animated = path.suffix == '.gif' and run == '6-latents-beta-1'
    if name == 'summary.json' or name in pictures or animated or path.parent == runs and path.suffix in ('.png', '.md', '.json'):
        copy = results / path.relative_to(runs)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.png':                       # of runs: 900 wide, which is what a page has
            picture = Image.open(path)
            if name in pictures and picture.width > 900:
                picture = picture.resize((900, picture.height * 900 // picture.width), Image.Resampling.LANCZOS)
            picture.quantize(128).save(copy, optimize=True)
        else:
            shutil.copyfile(path, copy)
EOF
    ;;
esac
if [ $print = yes ]; then exit 0; fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}. Its own message is above; the others are whole." >&2
    exit 1
fi
