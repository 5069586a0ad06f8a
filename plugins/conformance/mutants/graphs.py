"""Wrong graphs: what was true at capture and is not at replay."""

from __future__ import annotations

import torch
from torch import Tensor

from ....backends.base import Batch
from .right import Plan, RightAttention, cut


class CapturedLengths(RightAttention):
    """Replays use the lengths of the capture. Seen where a plan keeps a copy of its own."""

    def replay(self, plan: Plan, batch: Batch) -> None:
        plan.table.copy_(self.table(batch, plan.owners))


class CapturedPages(RightAttention):
    """Replays read the pages of the capture. Seen where a plan keeps a copy of its own."""

    def replay(self, plan: Plan, batch: Batch) -> None:
        plan.positions.copy_(batch.positions)


class CapturedGrid(RightAttention):
    """A graph walks as many tiles as its capture did. Seen where the host computes the grid."""

    def walked(self, batch: Batch) -> list[int]:
        self.capturing = False
        return super().walked(batch)


class SharedWorkspace(RightAttention):
    """A step with prefills plans over what captured graphs read. Seen where the plans of decodes
    and of prefills go into one workspace.
    """

    def capture(self, max_num_seqs: int) -> None:
        super().capture(max_num_seqs)
        self.workspace = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.config.device)

    def owners(self, batch: Batch) -> Tensor:
        owners = super().owners(batch)
        if not self.capturing:
            return owners
        prefills = owners[batch.num_decodes :]
        planned = prefills if len(prefills) else owners
        kept = self.workspace[: len(planned)]
        kept.copy_(planned[: len(kept)])
        return owners if len(prefills) else kept


class WaitsForDevice(RightAttention):
    """The longest length is read back from the device. Seen where a kernel's grid needs it."""

    def splits(self, plan: Plan, rows: slice) -> list[range]:
        return cut(int(plan.positions[rows].max()) + 1, self.SPLIT)
