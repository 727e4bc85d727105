"""The exact engine: what the modules compute, to rounding, with less work and less memory.

`network` walks the modules of the encoder and of the decoder; `causal`, `norms` and `resample` are its layers,
`folding` the kernels they use, `statistics` the one barrier between layers, `plan` how much is done
at once, and `memory` what that takes.
Nothing is kept on the modules, and their weights are read anew at every chunk.
"""

from cogvae.exact.eligible import find_obstacle, report_obstacle
from cogvae.exact.loops import decoding_loop, encoding_loop
from cogvae.exact.memory import MemoryBudgetError, find_least_bytes
from cogvae.exact.plan import Limits

__all__ = [
    "Limits",
    "MemoryBudgetError",
    "decoding_loop",
    "encoding_loop",
    "find_least_bytes",
    "find_obstacle",
    "report_obstacle",
]
