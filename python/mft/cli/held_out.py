"""Take prompts with their own answers from the held-out data of a run."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mft.config import RunConfig
from mft.data.batches import take_rows
from mft.data.splits import load_splits
from mft.data.tokenization import IGNORED
from mft.evaluation.continuation import text_before
from mft.evaluation.evaluated_base import config_of_run, evaluated_config
from mft.evaluation.exchanges import Exchange, find_answers
from mft.masks.location import masks_directory

_CONTINUED = 32  # tokens that are wanted after the first half of a plain text


@dataclass(frozen=True)
class Prompt:
    """A prompt in the words that a reader needs, as tokens, and the data's own answer if it has one."""

    text: str
    ids: list[int]
    wanted: str | None = None


def config_of_data(run: str) -> RunConfig:
    """Return the configuration of a run, with its paths as seen from here. Raises: ValueError if it has none."""
    masks = masks_directory(run)
    if config_of_run(masks) is None:
        raise ValueError(
            f"--held-out must come with an output_dir of mft train, whose config.yaml names its data, got {run}: "
            "--prompts FILE answers others"
        )
    return evaluated_config(masks, [])[0]


def held_out_prompts(config: RunConfig, tokenizer: Any, ends: Sequence[int], count: int, seed: int) -> list[Prompt]:
    """Draw prompts of the validation data; of a text the first half. ends: the tokens that end an answer."""
    rows = load_splits(config.data, tokenizer, pairs=config.objective.takes_pairs).rows_of("validation")
    found = find_answers(rows, ends, pairs=config.objective.takes_pairs) or _halves(rows)
    texts = _prompt_texts(found, tokenizer)
    picked = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return [Prompt(texts[i], found[i].prompt, text_before(ends, found[i].completion, tokenizer)) for i in picked]


# ---------------------------------------------------------------------------------------------- private


def _halves(rows: Any) -> list[Exchange]:
    batch = take_rows(rows, list(range(len(rows))))
    found = []
    for ids, labels, document in zip(batch.input_ids, batch.labels, batch.documents):
        tokens = ids[: int((labels != IGNORED).nonzero().max()) + 1].tolist()
        half = (len(tokens) + 1) // 2
        found.append(Exchange(tokens[:half], tokens[half : half + _CONTINUED], document))
    return found


def _prompt_texts(found: Sequence[Exchange], tokenizer: Any) -> list[str]:
    """Return the prompts as texts, without the whole turns with which all begin, and the one with which all end."""
    prompts, special = [each.prompt for each in found], set(tokenizer.all_special_ids)
    start, end, heading = 0, 0, ""
    if len(set(map(tuple, prompts))) > 1:
        head = prompts[0][: _common(prompts)]
        tail = prompts[0][len(prompts[0]) - _common([ids[::-1] for ids in prompts]) :]
        start = max((place + 1 for place, token in enumerate(head) if token in special), default=0)
        end = min((place - len(tail) for place, token in enumerate(tail) if token in special), default=0)
        heading = tokenizer.decode(head[start:]) if start else ""
    texts = [tokenizer.decode(ids[start : len(ids) + end], skip_special_tokens=True) for ids in prompts]
    # The first line that remains of the last turn is its speaker.
    return [(text.partition("\n")[2] if "\n" in heading else text).strip() for text in texts]


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens with which all rows begin."""
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows)))
