"""Declares torchvision's operators where its build for CUDA, beside a CPU build of torch, cannot.

On import it registers shapes for them. scripts/test_interop.sh puts this file into vLLM's environment.
"""

import torch

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", NMS)
