"""What one rank runs under a plan, without a clock: operators, placements, kernels, collectives."""
