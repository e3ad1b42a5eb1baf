"""The masked-diffusion process: mask probabilities, counter-based noise, segments, and the batch that training consumes."""
