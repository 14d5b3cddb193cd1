"""ditkit: the library of diffusion transformers."""
