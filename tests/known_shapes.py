"""Shapes that tests of the memory estimate share: LLaMA2-7B, 70B, and LLaMA2-7B at an eighth of its width."""

from mft.memory.shapes import known_config, shape_from_config

# LLaMA2-7B's proportions at an eighth of its width. Two of the four layers can be masked, between two that are not.
SMALL = known_config("llama2-7b") | {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
}
SEVEN = shape_from_config(known_config("llama2-7b"), "llama2-7b")
SEVENTY = shape_from_config(known_config("llama2-70b"), "llama2-70b")
LOCAL = (4, 5, 6, 7)
