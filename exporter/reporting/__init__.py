"""What a run says of itself: report, summary, model card."""
