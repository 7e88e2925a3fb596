"""Where there is no GPU, kernels.py runs under Triton's interpreter in all tests; Triton must be told before it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
