"""From logits to a token: parameters, noise, filters, logprobs, text."""
