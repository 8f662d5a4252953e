"""mft push: what was trained goes to the hub, whole, with a card that says what it is."""
