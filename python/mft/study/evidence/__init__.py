"""What a claim of a study rests on: sums per document, and what they can show."""
