"""What tests of banks share: generation from a batch whose rows have tasks of their own."""

import torch


def assert_generates_what_each_row_alone_does(bank, model_of, tasks, tokens, shortest):
    """Compare with model_of(task), row by row; rows are prompts of rising lengths, padded on the left."""
    prompts = [tokens[row, : shortest + row].tolist() for row in range(len(tasks))]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    attended = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with bank.use(tasks):
        found = bank.model.generate(padded, attention_mask=attended, **options)[:, longest:]
    told = set()
    for row, task in enumerate(tasks):
        ids = torch.tensor([prompts[row]])
        alone, bare = (
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
            for model in (model_of(task), model_of(None))
        )
        assert found[row].tolist() == alone
        told |= {task} if alone != bare else set()
    assert told == set(tasks) - {None}  # the masks decide what is generated
