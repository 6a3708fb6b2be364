"""The charts of a report, each as one SVG: drawn by matplotlib, which only these modules import."""
