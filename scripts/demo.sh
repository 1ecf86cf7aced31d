#!/usr/bin/env bash
# The main job on the embedded demo model: convert all layers, evaluate, export, reload with plain transformers, edit an expert.
source "$(dirname "$0")/setup.sh"
out=demo-glu-mxd

echo; echo "== mxdsurgery analyze demo-glu"
mxdsurgery analyze demo-glu
echo; echo "== mxdsurgery convert demo-glu --layers all --out $out --overwrite"
mxdsurgery convert demo-glu --layers all --out "$out" --overwrite
echo; echo "== mxdsurgery generate $out --prompt 'class Error(Exception):'"
mxdsurgery generate "$out" --prompt $'class Error(Exception):\n' --max-new-tokens 60
echo; echo "== mxdsurgery experts $out --tokens 100k --overwrite"
mxdsurgery experts "$out" --tokens 100k --overwrite
echo; echo "== mxdsurgery search $out 'raise ValueError(' --top 5"
mxdsurgery search "$out" 'raise ValueError(' --top 5
echo; echo "== mxdsurgery report $out"
mxdsurgery report "$out"
echo; echo "== python examples/ablate_expert.py $out --layer 1   (torch and transformers only)"
python examples/ablate_expert.py "$out" --layer 1
best=$(mxdsurgery search "$out" 'raise ValueError(' --top 1 --json |
    python -c 'import json, sys; found = json.load(sys.stdin)["experts"][0]; print(found["layer"], found["expert"], sep=":")')
echo; echo "== mxdsurgery edit $out --ablate $best --out $out-edited --overwrite"
mxdsurgery edit "$out" --ablate "$best" --out "$out-edited" --overwrite
