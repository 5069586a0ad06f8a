"""The attention: one call of torch for each sequence, of shapes that follow from it alone."""

from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention

from isobit.plugins import AttentionBackend, one_thread


class MinimalAttention(AttentionBackend):
    def plan(self, batch):
        return batch

    def run(self, q, k, v, layer, plan, out):
        layer.k.flatten(0, 1)[plan.slot_mapping] = k
        layer.v.flatten(0, 1)[plan.slot_mapping] = v
        lengths = zip(plan.query_lens, plan.kv_lens, accumulate(plan.query_lens), strict=True)
        for pages, (new, length, end) in zip(plan.block_table.long(), lengths, strict=True):
            used = pages[: -(-length // self.config.page_size)]
            # Slots past the length may hold NaN, which a mask would let through: cut them off.
            keys, values = (c[used].flatten(0, 1)[:length] for c in (layer.k, layer.v))
            # A copy, as q's place in memory follows from the neighbours, and torch may heed it.
            heads = (x.transpose(0, 1)[None] for x in (q[end - new : end].clone(), keys, values))
            mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
            with one_thread():  # torch cuts a single row's keys by the number of threads
                result = scaled_dot_product_attention(
                    *heads, attn_mask=mask, scale=self.config.scale, enable_gqa=True
                )
            out[end - new : end] = result[0].transpose(0, 1)
