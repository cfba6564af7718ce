"""Fast paths for traced forwards: Triton kernels and CPU code, each beside plain torch that it must agree with."""
