"""An interpreter of PTX in numpy: what a GPU's compiler gets, executed and checked on a CPU.

Every thread of a grid runs in step, so there are no timings and no races by chance; instead every
access is checked: bounds, alignment, barriers, and which thread may see what another one wrote.
Only the instructions that Triton made of our kernels are known; any other is a Fault.
"""
