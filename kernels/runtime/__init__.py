"""What all kernels share: JIT and ahead-of-time compilation, custom operators, the roofline."""
