"""Settings that a model type's small configuration needs besides the common sizes, and which part of it is used."""

from typing import Any

_TWO_KINDS = ["sliding_attention", "full_attention"] * 2
_HEADS = {"head_dim": 16, "num_key_value_heads": 2}
_GEMMA4_ASSISTANT = {
    "text_config": {
        **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
        **{"num_kv_shared_layers": 4, "num_hidden_layers": 4, "layer_types": _TWO_KINDS},
    },
    "backbone_hidden_size": 64,
}
_QWEN4 = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
    **{"indexer_compress_ratio": 4, "hc_lowrank": 8, "shared_expert_intermediate_size": 32},
    **{"ple_layer_ids": [1], "ple_embed_dim": 64, "ngram_vocab_size_base": 50, "heads_per_ngram": 2},
    **{"make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1, "eos_token_id": 2},
}
_DOTS3 = {
    **{"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    **{"swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "head_dim": 32},
    "shared_experts_intermediate_size": 32,
}
_REFORMER = {
    **{"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 48), "attn_layers": ("local", "lsh"), "hash_seed": 0},
    **{"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "attention_head_size": 16, "feed_forward_size": 96},
}
_PERCEIVER = {"num_latents": 8, "d_latents": 64, "num_self_attends_per_block": 2}
_SWIN = {"embed_dim": 24, "num_heads": (1, 2, 2, 2), "depths": (1, 2, 1, 1), "window_size": 2, "patch_size": 4}
_RESNET_BELOW = {
    **{"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
    "backbone_config": {
        **{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        **{"layer_type": "basic", "out_features": ["stage1", "stage2"]},
    },
}
_FOURFOLD = {"audio_config": {"intermediate_size": 256}}  # times the hidden size: four frames are concatenated
_CODEC = {"num_filters": 4, "depths": (1,) * 7, "hidden_size": 16}

_VIDEOPRISM = {"num_frames": 4, "tubelet_size": [1, 8, 8]}

# By model type, or by "sweep/model type".
SIZES: dict[str, dict[str, Any]] = {
    # causal language models
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": {
        "layer_types": _TWO_KINDS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _TWO_KINDS},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 96}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "pyramid_num_routed": [-1, 4, 4]},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        **{"layer_types": _TWO_KINDS, "num_kv_shared_layers": 2, "intermediate_size": 96, "laurel_rank": 8},
        **{"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    },
    "gemma4_assistant": _GEMMA4_ASSISTANT,
    "gemma4_unified_assistant": _GEMMA4_ASSISTANT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS | {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "ministral": _HEADS,
    "musicgen": {"decoder": {"num_codebooks": 2}},
    "musicgen_melody": {"decoder": {"num_codebooks": 2}},
    "nemotron": _HEADS,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": _REFORMER,
    "causal/reformer": _REFORMER | {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "adapter_rank": 8, "chunk_size": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    # encoders, encoder-decoders
    "encoder/t5gemma": {"is_encoder_decoder": False},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esm": {"vocab_size": 99, "pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}},
        "word_timestamp_config": {"vocab_size": 99, "blank_token_id": 98},
    },
    "perceiver": _PERCEIVER,
    # vision
    "align": {
        "vision_config": {
            **{"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 64, "image_size": 64},
        },
        "projection_dim": 64,
    },
    "blip-2": {
        "qformer_config": {"use_qformer_text_input": True, "encoder_hidden_size": 64, "vocab_size": 99},
        "image_text_hidden_size": 32,
    },
    "conditional_detr": _RESNET_BELOW,
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "dab-detr": _RESNET_BELOW,
    "deformable_detr": _RESNET_BELOW,
    "depth_pro": {
        **{"patch_size": 32, "intermediate_hook_ids": [3, 1], "fusion_hidden_size": 16},
        **{"scaled_images_feature_dims": [16, 16, 8], "intermediate_feature_dims": [16, 8]},
    },
    "detr": _RESNET_BELOW,
    "dinov3_convnext": {"image_size": 64},
    "donut-swin": _SWIN | {"image_size": 64},
    "efficientnet": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256, "image_size": 64},
    "glpn": {"image_size": 128},
    "levit": {"image_size": 128, "patch_size": 16},
    "vision/llama4": {
        "vision_config": {"intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64},
    },
    "vision/mllama": {
        "vision_config": {
            **{"intermediate_layers_indices": [0, 2], "num_global_layers": 1, "vision_output_dim": 192},
        },
        "text_config": {"cross_attention_layers": [1, 3]},
    },
    "mobilevit": {"image_size": 128, "patch_size": 2},
    "mobilevitv2": {"image_size": 128, "patch_size": 2},
    "pvt": {"image_size": 128, "patch_size": 4},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6, "mm_tokens_per_image": 4},
    "siglip2": {"vision_config": {"num_patches": 16}},
    "swin": _SWIN | {"image_size": 64},
    "swin2sr": {"embed_dim": 24, "num_heads": (2, 2), "depths": (1, 2), "window_size": 4, "patch_size": 1},
    "swinv2": _SWIN | {"image_size": 64},
    "table-transformer": _RESNET_BELOW,
    "timesformer": {"num_frames": 4},
    "videomae": {"num_frames": 4},
    "videoprism": {"vision_config": _VIDEOPRISM},
    "videoprism_vision_model": _VIDEOPRISM,
    "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    # speech
    "audio-spectrogram-transformer": {"max_length": 40, "patch_size": 8},
    "dia": {
        "decoder_config": {
            **{"cross_hidden_size": 64, "cross_num_attention_heads": 4, "cross_num_key_value_heads": 4},
            **{"cross_head_dim": 16, "num_channels": 3},
        },
        "delay_pattern": [0, 1, 2],
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glmasr": _FOURFOLD,
    "granite_speech": {"encoder_config": {"hidden_dim": 64}},
    "granite_speech_plus": {"encoder_config": {"hidden_dim": 64}},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 32, "num_key_value_heads": 4}},
    "kyutai_speech_to_text": {
        **{"audio_pad_token_id": 98, "audio_bos_token_id": 97, "codebook_vocab_size": 97, "num_codebooks": 3},
        "codec_config": {"upsample_groups": 8, "num_filters": 8},
    },
    "moonshine_streaming": {"num_key_value_heads": 4, "encoder_config": {"num_key_value_heads": 4}},
    "qwen3_asr": {"audio_config": {"output_dim": 64}},
    "speech-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "vibevoice": {"audio_config": _CODEC, "semantic_model_config": _CODEC},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _CODEC, "semantic_tokenizer_encoder_config": _CODEC},
    "voxtral": _FOURFOLD | {"audio_token_id": 98},
    "wav2vec2-bert": {"vocab_size": 99},
    "wav2vec2-conformer": {"vocab_size": 99},
}

# For these, the class wants only a part of the configuration.
PARTS = {"causal/musicgen": "decoder", "causal/musicgen_melody": "decoder", "vision/llama4": "vision_config"}

# Classes other than the mapping's: DepthPro's last hidden state does not come from all layers.
CLASSES = {"vision/depth_pro": "DepthProForDepthEstimation", "vision/llama4": "Llama4VisionModel"}

# Models that transformers makes, but that do not compute their function here.
NOT_HERE = {"mra": "its attention is a CUDA kernel's alone: without a GPU transformers gives zeros for it"}

# Options for mask_model in place of its default. BLT's patcher decides where patches end, and learns nothing from that.
INSTEAD: dict[str, dict[str, Any]] = {"blt": {"exclude_modules": ["patcher"]}}

# Options for mask_model where it refuses its default.
WHERE_REFUSED: dict[str, dict[str, Any]] = {
    "dbrx": {"exclude_modules": ["experts"]},
    "deberta": {"exclude_modules": ["in_proj"]},
    "deepseek_v4": {"exclude_modules": ["o_a_proj", "compressor"]},
    "falcon_mamba": {"target_modules": ["in_proj"]},
    "funnel": {"target_modules": ["q_head", "k_head", "v_head", "post_proj", "linear_1", "linear_2"]},
    "inkling_text": {"exclude_modules": ["shared_experts"]},
    "longcat_flash": {"exclude_modules": ["experts"]},
    "mamba": {"target_modules": ["in_proj"]},
    "mamba2": {"target_modules": ["in_proj"]},
    "wavlm": {"exclude_modules": ["k_proj", "q_proj", "v_proj", "out_proj"]},
    "xlnet": {"target_modules": ["layer_1", "layer_2"]},
    "zamba": {"target_modules": ["mamba.in_proj", "mamba.out_proj", "linear"]},
    "zamba2": {"target_modules": ["mamba.in_proj", "linear"]},
}
