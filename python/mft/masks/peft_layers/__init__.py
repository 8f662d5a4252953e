"""The layers that PEFT wraps others in: masks on a weight, on experts and on codes; also combinations of masks."""
