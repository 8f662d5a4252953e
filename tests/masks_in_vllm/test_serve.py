"""Options of python -m mft.vllm: ours are read, vLLM's are passed on, and errors are reported before vLLM starts."""

import pytest
from served import save_scattered
from tiny import make_llama

import mft.vllm
from mft.vllm import serve


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exports") / "code"
    save_scattered(make_llama, directory)
    directory.with_suffix(".txt").write_text(f"code={directory}\n")
    return directory


def test_options_of_vllm_are_handed_on():
    ours, rest = serve.read_arguments(["base", "--masks", "a=b", "--port", "1", "--masks", "c=d", "--force"])
    assert (ours.masks, ours.force, rest) == (["a=b", "c=d"], True, ["base", "--port", "1"])
    assert not ours.per_request
    assert serve.read_arguments(["base", "--per-request"])[0].per_request


def test_tasks_are_directories_of_masks(export):
    assert serve.check_tasks([f"code={export}"]) == {"code": str(export)}
    found = serve.check_tasks([f"maths={export}"], export.with_suffix(".txt"))
    assert found == {"maths": str(export), "code": str(export)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base"], "--masks must be given for each task, as name=DIRECTORY, got none"),
        (["base", "--masks", "code={}/nothing"], "--masks must name a directory, 'code' is"),
        (["base", "--masks", "code={}", "--masks-file", "{}.txt"], "--masks-file must name no task of --masks"),
        (["base", "--masks", "code={}", "-q", "fp8"], "-q must be left out, because mft sets it for masks in vLLM"),
    ],
)
def test_what_is_wrong_ends_it_with_one_line(export, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(serve, "check_vllm", lambda: None)
    with pytest.raises(SystemExit) as ended:
        serve.main([word.format(export) for word in arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize("built", [True, False])
def test_masks_per_request_without_kernels_are_warned_about_once(export, monkeypatch, caplog, built):
    cpu = {"available": built, "detail": "", "reason": None if built else "its library is not built"}
    report = {"backends": {"cpu": cpu}, "auto": {"cpu": "cpu" if built else "reference"}}
    monkeypatch.setattr("mft.vllm.token_masks.backend_report", lambda: report)
    monkeypatch.setattr(serve, "check_vllm", lambda: None)
    monkeypatch.setattr(serve, "_serve", lambda *_: None)
    for option in ("--per-request", "--force"):
        serve.main(["base", "--masks", f"code={export}", option])
    warned = (
        [] if built else ["masks per request run in plain PyTorch, because the cpu backend cannot run: its library"]
    )
    assert [message.partition(" is not built")[0] for message in caplog.messages] == warned


def test_options_that_masks_set_are_refused_in_python(export, monkeypatch):
    monkeypatch.setattr("mft.vllm.client.check_vllm", lambda: None)
    for option, value in (("quantization", "fp8"), ("enable_lora", True), ("max_loras", 3)):
        with pytest.raises(ValueError, match=f"{option} must be left out, .* got {value!r}"):
            mft.vllm.load("base", {}, **{option: value})
    with pytest.raises(ValueError, match="enforce_eager must be on with masks per request, .* leave it out"):
        mft.vllm.load("base", {"code": export}, per_request=True, enforce_eager=False)
