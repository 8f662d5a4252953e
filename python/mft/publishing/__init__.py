"""mft push: upload what was trained to the hub, with a card that describes it."""
