#!/bin/sh
# A small Shakespeare from random weights: about three minutes on two cores, then a sample.
# The tokenizer (1,024 byte-level tokens) is trained on the text first.
set -e
here=$(dirname "$0")
etx train --config "$here/shakespeare.json" --data "$here/shakespeare.txt" --optimizer adamw --steps "${STEPS:-500}" \
    --schedule cosine --warmup-steps 10 --clip-norm 1 --eval-every 100 --output "${OUT:-runs/shakespeare}" --plot "${OUT:-runs/shakespeare}.png"
etx run "${OUT:-runs/shakespeare}"/step-* -p "ROMEO
" -n 120 --temp 0.8 --top-k 40 --seed 1 --quiet
