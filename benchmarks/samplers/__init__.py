"""Every sampler with every objective: quality against evaluations of the network, on digits."""
