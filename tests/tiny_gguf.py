"""A GGUF file of 24 kB: a random Llama of two blocks and its tokenizer of 41 tokens."""

import string

import gguf
import numpy

HIDDEN, INTERMEDIATE, BLOCKS, HEADS, KV_HEADS = 16, 32, 2, 2, 1
PAIRS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st"]
TOKENS = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, "Ġ", *PAIRS, "<|endoftext|>"]


def write_tiny_gguf(path, feed_forward=INTERMEDIATE, tokenizer="gpt2", down="F32"):
    """Write the file and return the bytes of its header.

    feed_forward: the length that the header claims, whatever the tensors' shapes are. tokenizer: gpt2, or llama
    (sentencepiece). down: the type of ffn_down, the only tensor whose rows are a whole block; all others are F32.
    """
    chance = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_custom_alignment(32)
    writer.add_tokenizer_model(tokenizer)
    if tokenizer == "llama":
        writer.add_token_list([token.replace("Ġ", "▁") for token in TOKENS])
        writer.add_token_scores([-float(number) for number in range(len(TOKENS))])
    else:
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_merges([" ".join(pair) for pair in PAIRS])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    shapes |= dict.fromkeys(("attn_k", "attn_v"), (HIDDEN // HEADS * KV_HEADS, HIDDEN))
    shapes |= {"ffn_gate": (INTERMEDIATE, HIDDEN), "ffn_up": (INTERMEDIATE, HIDDEN), "ffn_down": (HIDDEN, INTERMEDIATE)}
    shapes |= {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    named = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    named |= {f"blk.{block}.{name}": shape for block in range(BLOCKS) for name, shape in shapes.items()}
    for name, shape in named.items():
        values = chance.standard_normal(shape).astype(numpy.float32)
        if name.endswith("ffn_down") and down != "F32":
            kind = gguf.GGMLQuantizationType[down]
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path).data_offset
