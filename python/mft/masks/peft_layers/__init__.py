"""What PEFT wraps a layer in: masks on a weight, on experts and on codes, and masks made of several."""
