"""Mathematics that knows no architecture: attention, flow matching, samplers, guidance."""
