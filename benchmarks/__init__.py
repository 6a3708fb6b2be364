"""What rotq measures of itself, as ratios in one run."""
