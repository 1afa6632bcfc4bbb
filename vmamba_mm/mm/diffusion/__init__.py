"""Training of models that make images of noise, with samplers of diffusers."""
