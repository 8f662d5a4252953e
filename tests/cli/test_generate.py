"""mft generate and mft chat: base and masked answers, the conversation, and directories that are no run."""

import json
import shutil

import pytest
import torch
from tiny import make_llama, save_llama
from tiny_run import LEARN, invoke, refused, succeed

from mft.cli.generate import Sampling, open_voices
from mft.config import MaskConfig
from mft.masks.convert import mask_model, merge_model
from mft.masks.export import load_masks, save_masks
from mft.models.pretrained import load_model, save_model

TEMPLATE = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
GREEDY = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make base/, whose weights are so large that masks decide the likeliest token, and masks/ on it that drop half."""
    directory = tmp_path_factory.mktemp("place")
    save_llama(directory / "base")
    make_llama(initializer_range=0.3).save_pretrained(directory / "base")
    (directory / "base" / "chat_template.jinja").write_text(TEMPLATE)
    model = mask_model(make_llama(initializer_range=0.3), MaskConfig.paper(keep_ratio=0.5))
    save_masks(model, directory / "masks", base_model_name_or_path=str(directory / "base"))
    return directory


def continued(model, prompt, tokens=6):
    """Return a greedy continuation, token by token, without a cache."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return " ".join(map(str, ids[len(prompt) :]))


def answers(output):
    """Return {name: its answers, in order}."""
    found, name = {}, None
    for line in output.splitlines():
        if line in ("base:", "masked:"):
            name = line[:-1]
        elif name and line.strip() and not line.startswith("("):
            found.setdefault(name, []).append(line.strip())
    return found


def test_base_and_masked_answer_as_the_two_models_do(place):
    output = succeed("generate", place / "masks", "5 6 7", "--max-tokens", 6)
    base = make_llama(initializer_range=0.3)
    expected = {"base": [continued(base, [5, 6, 7])]}
    merged = merge_model(load_masks(base, place / "masks"))
    expected["masked"] = [continued(merged, [5, 6, 7])]
    assert answers(output) == expected
    assert expected["base"] != expected["masked"]
    assert output.count("(cut after 6 tokens)") == 2


def controls(output):
    return {letter for letter in output if not letter.isprintable()} - {"\n"}


@pytest.mark.parametrize(
    "arguments", [("generate", "evil", "5"), ("inspect", "evil"), ("verify", "evil"), ("verify", "\x1b[2J")]
)
def test_no_text_of_a_stranger_controls_the_terminal_or_becomes_a_line(place, monkeypatch, arguments):
    monkeypatch.chdir(place)
    model = mask_model(make_llama(), MaskConfig.paper(keep_ratio=0.5))
    save_masks(model, place / "evil", base_model_name_or_path="x/\x1b[2Jy\u202e\nbase: agrees")
    output = refused(*arguments)
    assert r"\x1b[2J" in output
    assert not controls(output)
    assert "\nbase: agrees" not in output


def test_no_generated_token_controls_the_terminal(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] = {
        word if number < 10 else f"\x1b[{number}m": number for word, number in values["model"]["vocab"].items()
    }
    path.write_text(json.dumps(values))
    output = succeed("generate", tmp_path / "base", "5 6 7", "--raw", "--max-tokens", 6)
    assert "\\x1b[" in output
    assert not controls(output)


@pytest.mark.parametrize("raw", [("--raw",), ()])
def test_a_prompt_that_is_not_utf_8_is_one_sentence(place, raw):
    code, output = invoke("generate", place / "masks", "5 \udcff", *raw)
    assert (code, output) == (
        2,
        "error: PROMPT must be Unicode text, got a byte that is not UTF-8 at character 2: '\\udcff' (str)\n",
    )


def test_only_one_of_them_answers(place):
    both = answers(invoke("generate", place / "masks", "5", "--max-tokens", 4)[1])
    for name in ("base", "masked"):
        output = succeed("generate", place / "masks", "5", "--max-tokens", 4, "--only", name)
        assert both[name][0] in output
        assert f"{name}:" not in output
    output = refused("generate", place / "masks", "5", "--only", "both")
    assert "--only must be one of base, masked, got 'both'" in output


def test_a_seed_says_what_is_drawn_and_a_temperature_of_0_draws_nothing(place):
    voices = open_voices(str(place / "masks"))

    def drawn(**options):
        return voices.answer("base", [5], Sampling(max_tokens=8, **options))

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    assert drawn(seed=1) == drawn(seed=2)


def test_a_template_is_applied_unless_raw(place, monkeypatch):
    (place / "base" / "chat_template.jinja").write_text("60 " + TEMPLATE)
    monkeypatch.setattr("mft.cli.generate.end_tokens", lambda *_: [])
    base = make_llama(initializer_range=0.3)
    try:
        for options, prompt in (((), [60, 5]), (("--raw",), [5])):
            output = invoke("generate", place / "masks", "5", "--max-tokens", 5, *options)[1]
            assert answers(output)["base"] == [continued(base, prompt, 5)]
            assert ("the prompt is a user's message" in output) == (not options)
    finally:
        (place / "base" / "chat_template.jinja").write_text(TEMPLATE)


def test_the_prompt_is_asked_with_a_system_prompt(place, tmp_path):
    model = mask_model(make_llama(initializer_range=0.3), MaskConfig.paper(keep_ratio=0.5))
    save_masks(model, tmp_path / "own", base_model_name_or_path=str(place / "base"), system_prompt="7 8")
    base = make_llama(initializer_range=0.3)
    (tmp_path / "lines.txt").write_text("5\n\n")
    for masks, options, prompt in (
        (tmp_path / "own", (), [7, 8, 5]),
        (tmp_path / "own", ("--system", "9"), [9, 5]),
        (tmp_path / "own", ("--system", ""), [5]),
        (place / "masks", (), [5]),
        (place / "masks", ("--system", "9"), [9, 5]),
    ):
        wanted = continued(base, prompt)
        for verb in (
            ("generate", masks, "5"),
            ("chat", masks),
            ("generate", masks, "--prompts", tmp_path / "lines.txt"),
        ):
            output = succeed(*verb, "--max-tokens", 6, *options, lines="5\n")
            assert wanted in output, verb
            assert (f"system prompt{' of the run' * (not options)}: " in output) == (len(prompt) > 1)


def test_a_file_of_chats_is_answered_up_to_its_last_answer(place, tmp_path):
    base = make_llama(initializer_range=0.3)
    wanted = continued(base, [7, 5])
    chats = [
        [("system", "7"), ("user", "5"), ("assistant", wanted)],
        [("user", "5"), ("assistant", "6"), ("user", "9")],
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    output = succeed("generate", place / "masks", "--prompts", tmp_path / "chats.jsonl", "--max-tokens", 6)
    assert f"1 of 2: 5\nwanted: {wanted}\nbase: {wanted} (cut after 6 tokens)\nmasked: " in output
    assert f"2 of 2: 9\nbase: {continued(base, [5, 6, 9])} (cut" in output


def test_a_conversation_goes_on_with_each_ones_own_answers(place):
    output = succeed("chat", place / "masks", "--max-tokens", 3, lines="5\n\n6 7\n")
    found = answers(output)
    base = make_llama(initializer_range=0.3)
    models = {"base": base}
    first = {"base": continued(base, [5], 3)}
    masked = merge_model(load_masks(make_llama(initializer_range=0.3), place / "masks"))
    models["masked"], first["masked"] = masked, continued(masked, [5], 3)
    for name, model in models.items():
        before = [5, *map(int, first[name].split())]
        assert found[name] == [first[name], continued(model, [*before, 6, 7], 3)]


def test_a_merged_model_and_a_fine_tune_answer_alone(place, tmp_path):
    _, tokenizer = load_model(str(place / "base"))
    merged = merge_model(load_masks(make_llama(initializer_range=0.3), place / "masks"))
    for directory in (tmp_path / "merged", tmp_path / "run" / "model"):
        save_model(merged, tokenizer, directory)
    for run in (tmp_path / "merged", tmp_path / "run"):
        output = succeed("generate", run, "5 6 7", "--max-tokens", 6)
        assert "in float32: an ordinary model, without a separate base" in output
        assert continued(merged, [5, 6, 7]) in output
    output = refused("generate", tmp_path / "merged", "5", "--only", "masked")
    assert "--only must be left out" in output


def test_a_run_of_train_without_a_chat_template_has_no_chat(cli, tmp_path):
    assert cli("train", *LEARN)[0] == 0
    output = refused("chat", "run", lines="5\n")
    assert "run must have a tokenizer with a chat template, got none: mft generate run PROMPT continues text" in output


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_what_is_no_run_is_told_in_one_message(place, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    prompt = ["5"] if verb == "generate" else []
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("output_dir: begun\n")
    (tmp_path / "notes").mkdir()
    save_llama(tmp_path / "other")
    for run, options, message in (
        ("begin", (), "got begin: no such directory; did you mean ./begun?"),
        ("begun", (), "begun must hold masks, got a run that is not finished: mft train --resume begun goes on"),
        ("notes", (), "got notes, which is none of these"),
        (place / "masks", ("--model", tmp_path / "other"), "learned on"),
    ):
        output = refused(verb, run, *prompt, *options)
        assert message in output
        assert "Traceback" not in output


def test_masks_with_whole_modules_are_to_be_merged_first(place, tmp_path):
    shutil.copytree(place / "masks", tmp_path / "masks")
    path = tmp_path / "masks" / "adapter_config.json"
    values = json.loads(path.read_text()) | {"modules_to_save": ["lm_head"]}
    path.write_text(json.dumps(values))
    output = refused("generate", tmp_path / "masks", "5")
    assert f"got modules_to_save too (lm_head): mft merge {tmp_path / 'masks'} DIRECTORY" in output


def test_a_prompt_must_leave_room_for_an_answer(place):
    voices = open_voices(str(place / "masks"))
    voices.model.config.max_position_embeddings = 8
    assert len(voices.answer("base", [5] * 5, GREEDY).split()) <= 3
    with pytest.raises(ValueError, match="leave room for an answer among the model's 8 positions, got 8 tokens"):
        voices.answer("base", [5] * 8, GREEDY)
    with pytest.raises(ValueError, match="the prompt must hold at least one token, got none"):
        voices.answer("base", [], GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "mft generate must be given one of PROMPT, --held-out, --prompts, got none"),
        (("9", "--held-out", 2), "mft generate must be given one of PROMPT, --held-out, --prompts, got PROMPT and --h"),
        (("--held-out", 2, "--system", "7"), "--system must be left out with --held-out, whose prompts are whole"),
        (("--held-out", 2, "--raw"), "--raw must be left out with --held-out, whose prompts are whole"),
        (("9", "--raw", "--system", "7"), "--system must be left out if the prompt is no message, by --raw or"),
        (("--held-out", 2), "--held-out must come with an output_dir of mft train, whose config.yaml names its data"),
        (("--prompts", "empty.txt"), "--prompts empty.txt must hold a prompt per line, got none"),
        (("--prompts", "wrong.jsonl"), "wrong.jsonl:1: messages[0].role must be one of system, user, assistant, tool"),
        (("--prompts", "answer.jsonl"), "answer.jsonl:1: messages must hold a turn before the answer, got none"),
        (("--prompts", "missing.txt"), "missing.txt"),
    ],
)
def test_what_cannot_be_answered_is_refused(place, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, role in (("wrong", "me"), ("answer", "assistant")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": [{"role": role, "content": "9"}]}))
    output = refused("generate", place / "masks", *arguments)
    assert message in output
