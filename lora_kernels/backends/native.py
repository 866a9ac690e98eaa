"""The compiled backend: one call per op into C++ from csrc/cpu for CPU tensors and CUDA from csrc/cuda for those of a GPU.

A compiled module is for one Python and for one minor version of torch, which its name says (`lora_kernels._C_torch2_13`); the
package may hold several.
"""

import functools
import importlib
import json
import platform
import shlex
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

    return extension().qlora_linear_autograd(x, layers)
