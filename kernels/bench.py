"""Measure the kernels: `python kernels/bench.py`. See workbench_kernels/bench.py."""

from workbench_kernels.bench import main

if __name__ == "__main__":
    main()
