"""Where the Triton kernels are tested: on the GPU where there is one, else on the CPU by Triton's interpreter
(see tests/conftest.py). What they compile to is tested without a GPU, see tests/helpers/kernel_sass.py."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
