"""Kernels in Triton's interpreter, which has to be chosen before Triton is imported: in a process of their own."""

import os
import sys

if os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("Triton is imported already: run these in a process of their own, with TRITON_INTERPRET=1.")
    os.environ["TRITON_INTERPRET"] = "1"
