"""Two lm-eval tasks on a local file, and their scores from a model's own logits."""

import json
import math

import torch

QUESTIONS = [
    {"question": f"{a} + {b} =", "answers": [str(a + b), str(a + b + 1), str(7 * b - a)], "gold": (a * b) % 3}
    for a in range(5)
    for b in range(3)
]


def write_tasks(folder):
    """Write sums_choice (choose the answer) and sums_likelihood (how likely is the first); return their directory."""
    directory = folder / "tasks"
    directory.mkdir()
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files: {directory}/sums.jsonl\n  cache_dir: {folder}/cache\n"
        'test_split: train\ndoc_to_text: "{{question}}"\n'
    )
    (directory / "choice.yaml").write_text(
        f'task: sums_choice\n{shared}output_type: multiple_choice\ndoc_to_choice: "{{{{answers}}}}"\n'
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (directory / "likelihood.yaml").write_text(
        f'task: sums_likelihood\n{shared}output_type: loglikelihood\ndoc_to_target: " {{{{answers[0]}}}}"\n'
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
    )
    return directory


@torch.no_grad()
def log_likelihood(model, tokenizer, question, answer):
    """Return the log-likelihood of the answer's tokens after the question, from the model's own logits."""
    context, whole = tokenizer(question).input_ids, tokenizer(f"{question} {answer}").input_ids
    shares = model(torch.tensor([whole[:-1]])).logits[0].float().log_softmax(-1)
    return sum(shares[i - 1, whole[i]].item() for i in range(len(context), len(whole)))


def expected_scores(model, tokenizer):
    """Return the expected scores by task."""
    likelihoods = [[log_likelihood(model, tokenizer, q["question"], a) for a in q["answers"]] for q in QUESTIONS]
    right = sum(row.index(max(row)) == q["gold"] for row, q in zip(likelihoods, QUESTIONS))
    perplexity = math.exp(-sum(row[0] for row in likelihoods) / len(QUESTIONS))
    return {"sums_choice": right / len(QUESTIONS), "sums_likelihood": perplexity}
