"""What a study's claims rest on: sums per document, what they can show, and where they were computed."""
