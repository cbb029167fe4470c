"""Random tiny transformers models, one of each kind that accelerate() takes, and what runs them."""

import copy

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lego_kernels.hf import accelerated

ROPE = {"rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied-llama3": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 12,
            "rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3},
        },
    ),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "llama-yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                **ROPE,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),  # q, k and v with biases
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),  # norms of q and k
}
NUM_LAYERS = 4


def tiny_model(kind="llama", seed=0, dtype=torch.float32, **changes):
    """In eval mode, no eos token; norms and biases are random too."""
    family, options = KINDS[kind]
    options = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        **options,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{family}Config")(**options)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


def ragged(*lengths, seed=0, vocab_size=97):
    """input_ids and attention_mask of prompts of these lengths, padded on the left with 0."""
    width, generator = max(lengths), torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocab_size, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def cut(model, num_layers):
    """A model of its own with the first layers of this one."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    shallow = type(model)(config).eval()
    kept = {name: p for name, p in model.state_dict().items() if name in shallow.state_dict()}
    shallow.load_state_dict(kept)
    return shallow


def byte_tokenizer():
    """A token for each of the 256 bytes, the first 94 of them visible ASCII characters: of these
    the first pads and the second ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=alphabet[0],
        eos_token=alphabet[1],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def kept_decoders(monkeypatch):
    """A list of the decoders that accelerated models make from now on, with and without exits."""
    kept, make = [], accelerated.Decoder

    def keep(*args, **options):
        kept.append(make(*args, **options))
        return kept[-1]

    monkeypatch.setattr(accelerated, "Decoder", keep)
    return kept
