"""Self-speculation with a LayerSkip checkpoint: its own tokens, drafted by its first layers."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from lego_kernels.hf import accelerate


def complete(model, tokenizer, prompt, exit_layer):
    fast = accelerate(model, mode="speculative", exit_layer=exit_layer)
    ids = fast.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


if __name__ == "__main__":
    name = "facebook/layerskip-llama3.2-1B"  # 16 layers; its licence must be accepted on the hub
    model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
    print(complete(model, AutoTokenizer.from_pretrained(name), "Once upon a time", exit_layer=4))
