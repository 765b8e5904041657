"""A pretend GPU: tensors that say `cuda:0`, keep their numbers on the CPU, and refuse to meet CPU tensors.

    from tests.support.pretend import pretend_gpu

    with pretend_gpu() as journal:
        loaded = unirank.load(path)             # device=None takes the GPU: there is one now
        store = unirank.analyze(loaded, ...)    # gradients, healing and fine-tuning work too
    journal.entries                             # copies, reads, streams and events, in order
    journal.count("to host")                    # how many of a kind

What it is for: a tensor that was left on the wrong device is an error here as on a GPU. The arithmetic is the CPU's, by
the same kernels in the same order, so results can be compared bit for bit with a CPU run, of models with
`attn_implementation="eager"` or inside `sdpa_kernel(SDPBackend.MATH)`: a CPU has attention kernels that a GPU has not.
`bf16=False` lets training run in float32, as it does on a CPU.

How: `PretendTensor` wraps a CPU tensor. Python sees `cuda:0`, and C++ sees the device `meta:0`, which autograd runs in
the thread that asks. Every op goes through `run` in `tensor`, by the class, and by a mode where no operand is of the
class; names of `torch.cuda` are replaced. Private names of torch are used where a tensor of another device cannot be
made without (the wrapper, the mode, the trees of arguments), and where C++ calls one (`torch.cuda._lazy_init`).

What it cannot see: speed, memory, another order of sums, kernels, races between streams (they are recorded, and all
is done at once; `tests.support.queue_order` finds races). A gradient that enters on the wrong device is found by the
first op that brings it together with another tensor, not by autograd.

`pretend_gpu(compositions=True)` runs unirank's ops as the torch compositions that serve a GPU without
`unirank_cuda.so`, so that those meet the rules too.

`rules` says which tensors may meet, `tensor` is the tensor, `runtime` what stands for `torch.cuda`, `journal` what
happened, `context` puts all in place and takes it away.
"""

from tests.support.pretend.context import pretend_gpu as pretend_gpu
from tests.support.pretend.journal import Journal as Journal
from tests.support.pretend.tensor import PretendTensor as PretendTensor
