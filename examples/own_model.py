"""A model that lego trained, in transformers: early exit, and which layer each token left at.

lego run --data notes.txt --out runs/own --model.upper-kv own
lego export runs/own notes-hf
python examples/own_model.py notes-hf "Once upon a time"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from lego_kernels.hf import accelerate


def complete(folder, prompt, exit_layer=2, threshold=0.3):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    fast = accelerate(model, mode="early_exit", exit_layer=exit_layer, threshold=threshold)
    batch = tokenizer(prompt, return_tensors="pt")
    out = fast.generate(**batch, max_new_tokens=32, return_dict_in_generate=True)
    return tokenizer.decode(out.sequences[0]), out.exit_layers[0].tolist()


if __name__ == "__main__":
    text, exit_layers = complete(*sys.argv[1:3])
    print(text, exit_layers, sep="\n")
