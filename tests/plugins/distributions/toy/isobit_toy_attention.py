"""The toy's kernels: float64 attention, one row of one sequence at a time."""

import torch

from isobit.plugins import AttentionBackend


class ToyAttention(AttentionBackend):
    def plan(self, batch):
        return batch

    def run(self, q, k, v, layer, plan, out):
        layer.k.flatten(0, 1)[plan.slot_mapping] = k
        layer.v.flatten(0, 1)[plan.slot_mapping] = v
        row, group = 0, self.config.num_q_heads // self.config.num_kv_heads
        for pages, new, length in zip(plan.block_table, plan.query_lens, plan.kv_lens, strict=True):
            needed = pages[: -(-length // self.config.page_size)].long()
            keys, values = (
                cache[needed].flatten(0, 1).repeat_interleave(group, 1).double()
                for cache in (layer.k, layer.v)
            )
            for seen in range(length - new + 1, length + 1):
                scores = torch.einsum("hd,thd->ht", q[row].double(), keys[:seen])
                weights = (scores * self.config.scale).softmax(-1)
                out[row] = torch.einsum("ht,thd->hd", weights, values[:seen])
                row += 1
