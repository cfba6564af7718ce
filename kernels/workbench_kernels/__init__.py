"""Fast paths for traced forwards: Triton kernels and CPU code, each beside the plain torch code that it must agree with."""
