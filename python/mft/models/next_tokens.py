"""Read from a configuration, before weights are loaded, whether a model predicts next tokens, and its longest row."""

from typing import Any

# AutoModelForCausalLM's model types in which a token sees later tokens unless this field is true; None: always.
_SEES_AHEAD_UNLESS: dict[str, str | None] = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), "is_decoder"),
    **dict.fromkeys(("ernie", "megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm"), "is_decoder"),
    **dict.fromkeys(("roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"), "is_decoder"),
    "xlm": "causal",
    "xlnet": None,
}


def check_next_tokens(config: Any, name: str, length: int | None = None) -> None:
    """Raise ValueError unless a model of this configuration learns next tokens in rows of this length."""
    kind, text = config.model_type, config.get_text_config(decoder=True)
    field = _SEES_AHEAD_UNLESS.get(kind)
    if kind in _SEES_AHEAD_UNLESS and not (field and getattr(config, field)):
        told, remedy = "", "name a decoder"
        if field:
            told, remedy = f" with {field} false", f"{remedy}, or set {field} to true in its config.json if it is one"
        raise ValueError(
            f"model.name must be a causal language model, got {name!r}: a model of type {kind}{told} sees the tokens "
            f"that it is to predict; {remedy}"
        )
    if getattr(text, "use_bidirectional_attention", None) is True:
        raise ValueError(
            f"model.name must be a causal language model, got {name!r}: with use_bidirectional_attention it sees the "
            "tokens that it is to predict; name a decoder, or set that to false in its config.json if it is one"
        )
    longest = longest_row(config)
    if length is not None and longest is not None and length > longest:
        beyond = ", or a rope scaling that reaches further in its config.json" if rotary_settings(text) else ""
        raise ValueError(
            f"data.sequence_length must be at most {longest}, as many positions as {name!r} has "
            f"(max_position_embeddings), got {length}: set data.sequence_length={longest} or less{beyond}"
        )


def longest_row(config: Any) -> int | None:
    """Return the number of tokens that the model has positions for, with rope scaling; None if there is no limit."""
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None or getattr(text, "alibi", False):
        return None
        # Beyond max_position_embeddings, "dynamic" changes frequencies with the length of this and earlier calls.
    scaled = [rope for rope in rotary_settings(text) if rope.get("factor") and rope.get("rope_type") != "dynamic"]
    return max(
        [positions, *(int(rope["factor"] * rope.get("original_max_position_embeddings", positions)) for rope in scaled)]
    )


def rotary_settings(text: Any) -> list[dict[str, Any]]:
    """Return the settings of rotary positions: one, or one per kind of layer; empty if positions are not rotary."""
    found = getattr(text, "rope_parameters", None) or {}
    return [each for each in found.values() if isinstance(each, dict)] or ([found] if found else [])
