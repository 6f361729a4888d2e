"""Where a layer's inputs come from: synthetic images aligned to BN statistics, Gaussian draws, or data."""
