"""Attention kernels in CuTe DSL: Python that is compiled to PTX and machine code with no device and no nvcc.

`config` says what a kernel is built for, the module of its kind (`decode`, `combine`) is its source, `libraries` builds
and keeps it. Only building needs nvidia-cutlass-dsl.
"""
