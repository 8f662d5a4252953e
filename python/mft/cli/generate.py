"""mft generate and mft chat: print the answers of a run's base, and of the same base with the masks."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from mft.checks import check_one_of, check_rule, check_text, nearest_path
from mft.cli.held_out import Prompt, config_of_data, held_out_prompts
from mft.config import DTYPES, ModelConfig
from mft.data.formats import Chat, read_messages
from mft.data.record_files import read_files, read_lines, type_of
from mft.data.tokenization import apply_template
from mft.escaping import escaped
from mft.evaluation.continuation import continue_all, end_tokens, generating, tokens_before
from mft.evaluation.evaluated_base import base_words, learned_base
from mft.evaluation.verifiers import same_text
from mft.masks.bank import load_mask_bank
from mft.masks.export_format import CONFIG_FILE, check_run_has_masks, read_config
from mft.masks.location import local_directory, masks_directory
from mft.memory.model_config import read_model_config
from mft.models.next_tokens import longest_row
from mft.tracking.console import say
from mft.training.inputs import read_model
from mft.training.run_directory import MODEL

Message = dict[str, Any]
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

    Args:
        named: {name: a function whose context puts the model into that state}. An ordinary model has one name.
        system: the system prompt of the run, if its chats share one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        named: Mapping[str, Callable[[], AbstractContextManager[Any]]],
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self._named, self._system = model, tokenizer, named, system
        self.names = tuple(named)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a text to continue."""
        return self.tokenizer(text)["input_ids"]

    def begin_chat(self, system: str | None) -> list[Message]:
        """Return the first messages of a chat, and print them: the system prompt, by default the run's; "" for none."""
        text = self._system if system is None else system
        if not text:
            return []
        say(f"system prompt{' of the run' if system is None else ''}: {text}", style="dim")
        return [{"role": "system", "content": text}]

    def chat_prompt(self, messages: list[Message], place: str = "the chat") -> list[int]:
        """Return the tokens of messages, up to the assistant's answer. Raises: ValueError that starts with place."""
        return apply_template(self.tokenizer, Chat(messages), messages, place, add_generation_prompt=True)["input_ids"]

    def answer(self, name: str, prompt: list[int], sampling: Sampling, *, shown: bool = False) -> str:
        """Return the text that follows a prompt's tokens. shown: print it as it comes.

        Raises: ValueError if the prompt is empty, or leaves no room among the model's positions.
        """
        settings = self._settings([prompt], sampling)
        streamer = _Shown(self.tokenizer, skip_prompt=True, **_AS_TEXT) if shown else None
        ids = torch.tensor([prompt], device=next(self.model.parameters()).device)
        torch.manual_seed(sampling.seed)
        with torch.no_grad(), generating(self.model, settings), self._named[name]():
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)[0, len(prompt) :]
        if shown and len(made) == settings.max_new_tokens and int(made[-1]) not in settings.eos_token_id:
            say(f"(cut after {settings.max_new_tokens} tokens)", style="dim")
        return self.text_after(prompt, made.tolist())

    def answers(self, name: str, prompts: list[list[int]], sampling: Sampling) -> list[str]:
        """Return the answer to each prompt; one that is cut says so. Prompts are continued together."""
        settings = self._settings(prompts, sampling)
        torch.manual_seed(sampling.seed)
        with self._named[name]():
            found = continue_all(prompts, self.model, settings)
        texts = []
        for prompt, tokens in zip(prompts, found):
            made = tokens_before(settings.eos_token_id, tokens)
            cut = f" (cut after {len(made)} tokens)" if len(made) == settings.max_new_tokens else ""
            texts.append(self.text_after(prompt, made) + cut)
        return texts

    def text_after(self, prompt: list[int], tokens: list[int]) -> str:
        """Return the text of tokens that follow a prompt; with some tokenizers, it would lose its first space alone."""
        before, whole = (self.tokenizer.decode(ids, **_AS_TEXT) for ids in (prompt, [*prompt, *tokens]))
        return whole[len(before) :]

    def _settings(self, prompts: list[list[int]], sampling: Sampling) -> GenerationConfig:
        check_rule(all(prompts), "the prompt", "hold at least one token", "none")
        most, longest = sampling.max_tokens, max(map(len, prompts))
        if (positions := longest_row(self.model.config)) is not None:
            rule = f"leave room for an answer among the model's {positions} positions"
            check_rule(longest < positions, "the prompt", rule, f"{longest} tokens: begin with fewer")
            most = min(most, positions - longest)
        ends, pad = end_tokens(self.model, self.tokenizer), self.tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=most,
            do_sample=sampling.temperature > 0,
            eos_token_id=ends,
            pad_token_id=(ends or [0])[0] if pad is None else pad,
            **({"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if sampling.temperature > 0 else {}),
        )


@dataclass(frozen=True)
class Asked:
    """What mft generate answers: a prompt, this many of the run's held-out prompts, or those of a file.

    system: see Voices.begin_chat. raw: do not use the chat template.
    """

    prompt: str | None = None
    held_out: int | None = None
    prompts: Path | None = None
    system: str | None = None
    raw: bool = False

    def check(self) -> None:
        options = {"PROMPT": self.prompt, "--held-out": self.held_out, "--prompts": self.prompts}
        given = [name for name, value in options.items() if value is not None]
        rule = f"be given one of {', '.join(options)}"
        check_rule(len(given) == 1, "mft generate", rule, " and ".join(given) or "none")
        for option, text in (("PROMPT", self.prompt), ("--system", self.system)):
            check_text(option, text or "")
        for option, value in (("--system", self.system), ("--raw", self.raw or None)):
            rule = "be left out with --held-out, whose prompts are whole"
            check_rule(self.held_out is None or value is None, option, rule, repr(value))


def run_generate(run: str, asked: Asked, sampling: Sampling, **options: Any) -> None:
    """Do mft generate. options: as for open_voices."""
    asked.check()
    config = None if asked.held_out is None else config_of_data(run)
    voices = open_voices(run, **options)
    if config is not None and asked.held_out is not None:
        ends = end_tokens(voices.model, voices.tokenizer)
        _answer_all(voices, held_out_prompts(config, voices.tokenizer, ends, asked.held_out, sampling.seed), sampling)
        return
    if asked.prompts is not None:
        _answer_all(voices, _read_prompts(voices, asked.prompts, asked), sampling)
        return
    (ids,) = _user_prompts(voices, [str(asked.prompt)], asked)
    for name in voices.names:
        _say_name(name, voices)
        voices.answer(name, ids, sampling, shown=True)


def run_chat(run: str, sampling: Sampling, *, system: str | None = None, **options: Any) -> None:
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
    begin = voices.begin_chat(system)
    talks = {name: [*begin] for name in voices.names}  # each with its own answers
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
        raise _missing_model(run, place)
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


_BEYOND = 16  # tokens by which an answer may exceed the longest wanted one
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
    return Voices(model, tokenizer, {name: partial(bank.use, tasks[name]) for name in names}, export.system_prompt)


def _user_prompts(voices: Voices, texts: list[str], asked: Asked) -> list[list[int]]:
    """Return the tokens of texts: each a user's message by the chat template if there is one, else to be continued."""
    if not voices.has_template or asked.raw:
        rule = "be left out if the prompt is no message, by --raw or for lack of a chat template"
        check_rule(asked.system is None, "--system", rule, repr(asked.system))
        return [voices.prompt(text) for text in texts]
    say("the prompt is a user's message, by the chat template; --raw continues it as text", style="dim")
    begin = voices.begin_chat(asked.system)
    return [voices.chat_prompt([*begin, _user(text)]) for text in texts]


def _read_prompts(voices: Voices, path: Path, asked: Asked) -> list[Prompt]:
    """Read a file: a prompt per line, or .jsonl with whole chats, whose last answer is what is wanted."""
    if type_of(path) != ".jsonl":
        lines = [line for _, line, _ in read_lines(path)]
        texts = [text for line in lines if (text := line.strip())]
        check_rule(bool(texts), f"--prompts {path}", "hold a prompt per line", "none")
        return [Prompt(*pair) for pair in zip(texts, _user_prompts(voices, texts, asked))]
    records, found = read_files([path]), []
    for i, row in enumerate(records.rows):
        messages = read_messages(row.get("messages"), "messages", records.place(i))
        wanted = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
        check_rule(bool(messages), f"{records.place(i)}: messages", "hold a turn before the answer", "none")
        found.append(Prompt(messages[-1]["content"], voices.chat_prompt(messages, records.place(i)), wanted))
    return found


def _answer_all(voices: Voices, prompts: list[Prompt], sampling: Sampling) -> None:
    """Print each prompt with its answers and the wanted one. Answers far longer than all wanted ones are cut."""
    wanted = [each.wanted for each in prompts if each.wanted is not None]
    if len(wanted) == len(prompts):
        longest = max(len(voices.tokenizer(text)["input_ids"]) for text in wanted)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, longest + _BEYOND))
    answers = {name: voices.answers(name, [each.ids for each in prompts], sampling) for name in voices.names}
    for number, each in enumerate(prompts):
        say(f"\n{number + 1} of {len(prompts)}: {each.text}", style="bold")
        if each.wanted is not None:
            say(f"wanted: {each.wanted.strip()}", style="green")
        for name, texts in answers.items():
            say(f"{name}: {texts[number].strip()}")
    if len(wanted) == len(prompts):
        right = {name: sum(map(same_text, texts, wanted)) for name, texts in answers.items()}
        say(f"\nas wanted: {', '.join(f'{name} {count} of {len(wanted)}' for name, count in right.items())}")


def _missing_model(run: str, place: Path) -> Exception:
    """Return an error that says why run has no model to answer with."""
    kinds = "an output_dir of mft train, its masks/, or a model's directory"
    if not place.is_dir():
        return FileNotFoundError(f"RUN must be {kinds}, got {run}: no such directory{nearest_path(place)}")
    return ValueError(f"RUN must be {kinds}, got {run}, which is none of these")


def _line(question: str) -> str | None:
    try:
        line = input(question)
    except EOFError:
        return None
    check_text("a message", line)
    return line


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _say_name(name: str, voices: Voices) -> None:
    if len(voices.names) > 1:
        say(f"\n{name}:", style="bold")
