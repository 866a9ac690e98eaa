"""Arrival counters: int32 zeros that a kernel leaves at zero again.

Everything else that lives for one op (partial sums, panels of decoded weight) comes from torch's caching allocator, which
knows streams and CUDA graphs.  Counters would cost a launch to clear, so they are cut from one block per device, cleared once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

COUNTERS = 1 << 18
"""Counters of one device: 1 MiB."""
PER_STREAM = 1 << 13
"""Counters a stream keeps for its calls outside of graph capture; a call that needs more gets fresh zeros."""


@dataclass
class _Block:
    zeros: Tensor
    used: int = 0
    streams: dict[int, Tensor] = field(default_factory=dict)

    def take(self, n: int) -> Tensor | None:
        if self.used + n > self.zeros.numel():
            return None
        self.used += n
        return self.zeros[self.used - n : self.used]


_blocks: dict[torch.device, _Block] = {}
_lock = threading.Lock()


def counters(device: torch.device, n: int) -> Tensor:
    """At least `n` int32 zeros for one launch on the current stream.

    Launches of one stream run one after another and share theirs.  A launch that is captured in a CUDA graph gets counters of
    its own, because graphs may be replayed side by side; when the block is used up, or does not exist yet, the graph clears
    fresh ones on each replay.
    """
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream
    with _lock:
        block = _blocks.get(device)
        if block is None and not capturing:
            block = _blocks[device] = _Block(torch.zeros(COUNTERS, dtype=torch.int32, device=device))
            torch.cuda.synchronize(device)  # once per device: other streams must see the zeros
        if block is not None:
            if capturing:
                own = block.take(n)
            elif n <= PER_STREAM:
                own = block.streams.get(stream)
                if own is None:
                    own = block.take(PER_STREAM)
                    if own is not None:
                        block.streams[stream] = own
            else:
                own = None
            if own is not None:
                return own
    return torch.zeros(n, dtype=torch.int32, device=device)
