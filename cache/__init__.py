"""The KV cache: pages, the radix tree over them, the tensors."""
