"""A GPU without a GPU: real training steps on CUDA tensors that have shape, type and device, and no memory.

torch's fake tensors know the rules of a device without having one. What a build of torch for CPUs lacks beside them is
brought here:

guard     streams, devices and the answer "there is CUDA", in C++; g++ compiles it when a server starts
patches   the Python side of `torch.cuda`, and operators as a GPU runs them
ledger    what is alive on the device and how much that was at most; collectives in their order; values for the host
fits      a run of a recipe as one rank of any number, by the project's own trainer, strategy and DeepSpeed's engine
server    a process that has all that imported, and forks for every job
client    starts a server from a test, and asks it

Found by it: tensors of two devices that meet, ranks that would enter other collectives than their neighbours, types
that nobody asked for, memory at true size. Not to be found: values, races of streams, what NCCL does.
"""
