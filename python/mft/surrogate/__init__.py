"""The surrogate gradient of a mask's scores: scores near the threshold learn most, and deletions can be penalised."""
