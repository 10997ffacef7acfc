"""Real PyTorch layers of every strategy: what the simulator predicts, run.

One transformer layer of a `Model` under a `Plan`, as Megatron-LM, DeepSpeed-Ulysses and Transformer Engine run
it, embedding and head as Megatron-LM: forward, backward, communication. Tests and `verify` hold the simulator against
it. Needs torch.
"""

from spsim.pytorch.layers.collectives import HostTime
from spsim.pytorch.layers.groups import Groups
from spsim.pytorch.layers.layer import ParallelLayer
from spsim.pytorch.layers.recording import (
    CollectiveCall,
    SavedTensor,
    SavedTensors,
    operator,
    record_collectives,
    record_saved,
)
from spsim.pytorch.layers.vocabulary import ParallelEmbedding, ParallelHead

__all__ = [
    "CollectiveCall",
    "Groups",
    "HostTime",
    "ParallelEmbedding",
    "ParallelHead",
    "ParallelLayer",
    "SavedTensor",
    "SavedTensors",
    "operator",
    "record_collectives",
    "record_saved",
]
