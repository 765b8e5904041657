"""A pretend GPU: tensors that say `cuda:0`, keep their numbers on the CPU, and refuse to meet CPU tensors.

    from tests.support.pretend import pretend_gpu

    with pretend_gpu() as gpu:
        loaded = unirank.load(path)             # device=None takes the GPU: there is one now
        store = unirank.analyze(loaded, ...)    # gradients, healing and fine-tuning work too
    gpu.journal                                 # copies, reads, streams and events, in order
    gpu.count("to host")                        # how many of a kind

What it is for: a tensor that was left on the wrong device is an error here as it is on a GPU, on a machine without one. The
arithmetic is the CPU's, by the same kernels in the same order, so results can be compared bit for bit with a CPU run (both
with `attention="eager"` or inside `sdpa_kernel(SDPBackend.MATH)`: a CPU has an attention kernel that a GPU has not).

What it cannot see: speed, memory, another order of sums, races between streams (they are recorded, and everything runs at
once), kernels. `pretend_gpu(compositions=True)` lets unirank's ops run as the torch compositions that serve a GPU without
`unirank_cuda.so`, so that those meet the rules too; their sums have another order.

`rules` says which tensors may meet, `tensor` is the tensor, `runtime` what stands for `torch.cuda`, `context` puts all in
place and takes it away.
"""

from tests.support.pretend.context import pretend_gpu as pretend_gpu
from tests.support.pretend.journal import Journal as Journal
from tests.support.pretend.tensor import PretendTensor as PretendTensor
