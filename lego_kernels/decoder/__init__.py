"""Decoding with the exit decision in the loop: weights of any Llama-shaped model in, tokens out."""
