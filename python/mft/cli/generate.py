"""mft generate and mft chat: print the answers of a run's base, and of the same base with the masks."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from mft.checks import check_one_of, check_rule, check_text, nearest_path
from mft.config import DTYPES, ModelConfig
from mft.escaping import escaped
from mft.evaluation.continuation import generating
from mft.evaluation.evaluated_base import base_words, learned_base
from mft.masks.bank import load_mask_bank
from mft.masks.export_format import CONFIG_FILE, check_run_has_masks, read_config
from mft.masks.location import local_directory, masks_directory
from mft.memory.model_config import read_model_config
from mft.models.next_tokens import longest_row
from mft.tracking.console import say
from mft.training.inputs import read_model
from mft.training.run_directory import MODEL

BASE, MASKED = "base", "masked"
ONLY = (BASE, MASKED)


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated. Temperature 0 takes the likeliest token each time. Each answer starts from seed."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


class Voices:
    """One model that can answer under several names: as the base, or with the masks.

    Args: named: {name: a function whose context puts the model into that state}. An ordinary model has one name.
    """

    def __init__(
        self, model: Any, tokenizer: Any, named: Mapping[str, Callable[[], AbstractContextManager[Any]]]
    ) -> None:
        self.model, self.tokenizer, self._named = model, tokenizer, named
        self.names = tuple(named)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a text to continue."""
        return self.tokenizer(text)["input_ids"]

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of messages, up to the start of the assistant's answer."""
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    def answer(self, name: str, prompt: list[int], sampling: Sampling, *, shown: bool = False) -> str:
        """Return the text that follows a prompt's tokens. shown: print it as it comes.

        Raises: ValueError if the prompt is empty, or leaves no room among the model's positions.
        """
        check_rule(bool(prompt), "the prompt", "hold at least one token", "none")
        most = sampling.max_tokens
        if (positions := longest_row(self.model.config)) is not None:
            rule = f"leave room for an answer among the model's {positions} positions"
            check_rule(len(prompt) < positions, "the prompt", rule, f"{len(prompt)} tokens: begin with fewer")
            most = min(most, positions - len(prompt))
        settings = GenerationConfig(
            max_new_tokens=most,
            do_sample=sampling.temperature > 0,
            eos_token_id=_ends(self.model, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
            **({"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling.temperature > 0 else {}),
        )
        streamer = _Shown(self.tokenizer, skip_prompt=True, **_AS_TEXT) if shown else None
        ids = torch.tensor([prompt], device=next(self.model.parameters()).device)
        torch.manual_seed(sampling.seed)
        with torch.no_grad(), generating(self.model, settings), self._named[name]():
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)[0, len(prompt) :]
        if shown and len(made) == most and int(made[-1]) not in settings.eos_token_id:
            say(f"(cut after {most} tokens)", style="dim")
        # Decoded with the prompt: with some tokenizers, the first token of a text loses its space.
        before, whole = (self.tokenizer.decode(tokens, **_AS_TEXT) for tokens in (prompt, [*prompt, *made.tolist()]))
        return whole[len(before) :]


def run_generate(run: str, prompt: str, sampling: Sampling, *, raw: bool, **options: Any) -> None:
    """Do mft generate. options: as for open_voices."""
    check_text("PROMPT", prompt)
    voices = open_voices(run, **options)
    templated = voices.has_template and not raw
    ids = voices.chat_prompt([_user(prompt)]) if templated else voices.prompt(prompt)
    if templated:
        say("the prompt is a user's message, by the chat template; --raw continues it as text", style="dim")
    for name in voices.names:
        _say_name(name, voices)
        voices.answer(name, ids, sampling, shown=True)


def run_chat(run: str, sampling: Sampling, **options: Any) -> None:
    """Do mft chat: each line of standard input is a message, until its end. options: as for open_voices."""
    voices = open_voices(run, **options)
    if not voices.has_template:
        raise ValueError(
            f"{run} must have a tokenizer with a chat template, got none: mft generate {run} PROMPT continues text; "
            "model.chat_template gives a run a template"
        )
    is_asked = sys.stdin.isatty()
    if is_asked:
        say("a line is a message, Ctrl-D ends", style="dim")
    talks: dict[str, list[dict[str, str]]] = {name: [] for name in voices.names}  # each with its own answers
    while (line := _line("you: " if is_asked else "")) is not None:
        for name, talk in talks.items() if line.strip() else ():
            _say_name(name, voices)
            talk.append(_user(line))
            text = voices.answer(name, voices.chat_prompt(talk), sampling, shown=True)
            talk.append({"role": "assistant", "content": text.strip()})


def open_voices(
    run: str, *, model_name: str | None = None, dtype: str | None = None, force: bool = False, only: str | None = None
) -> Voices:
    """Load the model of a run of mft train or of an export of masks, or an ordinary model such as mft merge writes.

    Args:
        model_name, dtype: those of the base; by default, the base that the masks were learned on.
        force: accept another base of the same shapes.
        only: base or masked; None for both.
    Raises: ValueError or FileNotFoundError if run is none of these; as load_mask_bank.
    """
    if only is not None:
        check_one_of("--only", only, ONLY)
    place = local_directory(run)
    masks = masks_directory(place)
    if (masks / CONFIG_FILE).is_file():
        return _voices_of_masks(run, masks, model_name, dtype, force, ONLY if only is None else (only,))
    plain = next((each for each in (place, place / MODEL) if (each / "config.json").is_file()), None)
    if plain is None:
        check_run_has_masks(place)
        raise _nothing_there(run, place)
    for option, value in (("--model", model_name), ("--only", only)):
        check_rule(value is None, option, f"be left out for {run}, an ordinary model without masks", value)
    stored = read_model_config(str(plain)).get("dtype")
    config = ModelConfig(str(plain), dtype=dtype or (stored if stored in DTYPES else ModelConfig().dtype))
    say(f"{plain} in {config.dtype}: an ordinary model, without a separate base")
    return Voices(*read_model(config), {MODEL: nullcontext})


# ---------------------------------------------------------------------------------------------- private


class _Shown(TextStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(escaped(text), stream_end)


_AS_TEXT = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def _voices_of_masks(
    run: str, masks: Path, model_name: str | None, dtype: str | None, force: bool, names: tuple[str, ...]
) -> Voices:
    export = read_config(masks / CONFIG_FILE)
    if export.modules_to_save:
        raise ValueError(
            f"{run} must hold masks alone, so that base and masked model share their weights, got modules_to_save too "
            f"({', '.join(export.modules_to_save)}): mft merge {run} DIRECTORY, then name that directory"
        )
    config, words = learned_base(masks, model_name, dtype)
    say(words)
    model, tokenizer = read_model(config)
    bank = load_mask_bank(model, {MASKED: masks}, force=force)
    if export.base_quantization is not None:
        say(base_words(None, False, export))
    tasks = {BASE: None, MASKED: MASKED}
    return Voices(model, tokenizer, {name: partial(bank.use, tasks[name]) for name in names})


def _nothing_there(run: str, place: Path) -> Exception:
    """Return an error that says why run has no model to answer with."""
    kinds = "an output_dir of mft train, its masks/, or a model's directory"
    if not place.is_dir():
        return FileNotFoundError(f"RUN must be {kinds}, got {run}: no such directory{nearest_path(place)}")
    return ValueError(f"RUN must be {kinds}, got {run}, which is none of these")


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: those that the model and its tokenizer name."""
    said = getattr(model.generation_config, "eos_token_id", None)
    found = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))


def _line(question: str) -> str | None:
    try:
        line = input(question)
    except EOFError:
        return None
    check_text("a message", line)
    return line


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _say_name(name: str, voices: Voices) -> None:
    if len(voices.names) > 1:
        say(f"\n{name}:", style="bold")
