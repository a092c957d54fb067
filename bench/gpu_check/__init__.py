"""The CUDA kernels on a real GPU: are they right, does torch.compile see them, how fast are they.

    make gpu-check                                    # or: python -m bench.gpu_check
    python -m bench.gpu_check pack FOLDER             # what such a machine needs, if it has no network

It needs torch with CUDA and numpy; nvcc builds what was carried as source. Without a device it says so and ends. The
report is written again after every row, so that a run that is cut keeps what it had.
"""
